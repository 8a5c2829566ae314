"""Directions in weight space."""

import keras
import numpy as np
import pytest

from keras_nrs.flatness import random_direction
from keras_nrs.flatness.directions import check_directions
from tests.support.arrays import to_numpy
from tests.support.asserts import assert_equal
from tests.support.networks import cnn


def test_random_directions_are_filter_normalized() -> None:
    model = cnn()
    direction = random_direction(model, seed=3)
    for d, v in zip(direction, model.trainable_variables, strict=True):
        if len(v.shape) == 1:
            assert not np.any(d)
            continue
        filters = d.reshape(-1, d.shape[-1])
        expected = np.linalg.norm(to_numpy(v).reshape(filters.shape), axis=0)
        np.testing.assert_allclose(np.linalg.norm(filters, axis=0), expected, rtol=1e-6)
    again = random_direction(model, seed=3)
    assert_equal(direction, again)


@pytest.mark.matrix
def test_filters_of_each_kind_of_layer() -> None:
    """Depthwise: each channel's. Transposed: the output's, not the input's."""
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            keras.layers.DepthwiseConv2D(2, depth_multiplier=2),
            keras.layers.Conv2DTranspose(5, 2),
            keras.layers.LayerNormalization(axis=(2, 3)),
        ]
    )
    depthwise, _, transposed, *rest = model.trainable_variables
    for variable in (depthwise, transposed):
        scales = np.random.default_rng(0).uniform(0, 9, variable.shape)
        variable.assign(scales * to_numpy(variable))
    first, bias, second, *others = random_direction(model, seed=0)
    for direction, variable, axes in (
        (first, depthwise, (0, 1)),
        (second, transposed, (0, 1, 3)),
    ):
        norms = [
            np.linalg.norm(to_numpy(a), axis=axes[:2]) for a in (direction, variable)
        ]
        if len(axes) == 3:
            norms = [np.linalg.norm(n, axis=1) for n in norms]
        np.testing.assert_allclose(*norms, rtol=1e-5)
    assert len(rest) == len(others) == 3
    assert not any(map(np.any, [bias, *others]))


@pytest.mark.matrix
def test_neighbouring_seeds_share_no_direction() -> None:
    model = cnn()
    directions = [
        random_direction(model, seed=seed, index=index)[0].ravel()
        for seed in (0, 1)
        for index in (0, 1)
    ]
    cosines = np.corrcoef(directions) - np.eye(4)
    assert np.abs(cosines).max() < 5 / np.sqrt(len(directions[0]))


@pytest.mark.matrix
def test_random_directions_do_not_repeat_an_initialization() -> None:
    """Of NumPy's generator with the same seed, as the digits' demo has it."""
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(30)])
    kernel, _ = model.trainable_variables
    kernel.assign(np.random.default_rng(0).standard_normal(kernel.shape))
    direction, _ = random_direction(model, seed=0)
    cosine = np.corrcoef(direction.ravel(), to_numpy(kernel).ravel())[0, 1]
    assert abs(cosine) < 4 / 30  # 4 standard deviations of 900 independent numbers


def test_a_number_of_directions_of_numpy() -> None:
    model = cnn()
    first, second = check_directions(model, np.int64(2), seed=3)
    assert_equal(first, random_direction(model, seed=3))
    assert_equal(second, random_direction(model, seed=3, index=1))
