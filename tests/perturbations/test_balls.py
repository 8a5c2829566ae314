"""The lengths of delta: of all of it, of each variable and of each output unit."""

import math
from typing import Any

import keras
import numpy as np
import pytest
import scipy.stats
from keras import layers
from keras import ops

from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs.backend import compile_function
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations import LayerwiseBall
from keras_nrs.perturbations import RelativeBall
from tests.support.arrays import ULP
from tests.support.matrix import rest
from tests.support.perturbations import NORM_RTOL
from tests.support.perturbations import RANDOM
from tests.support.perturbations import WITH_RADIUS
from tests.support.perturbations import norm
from tests.support.perturbations import to_numpy
from tests.support.perturbations import weights_like
from tests.support.statistics import LEVEL
from tests.support.statistics import key


def test_default_radii() -> None:
    radii = ["volume", "uniform", "uniform", "sphere", "uniform"]
    assert [cls().radius for cls in WITH_RADIUS] == radii
    assert {cls().noise for cls in RANDOM} == {"normal"}


# All weights, and each variable.


@pytest.mark.parametrize("noise", ["normal", *rest("rademacher")])
def test_relative_radius_is_a_share_of_the_norm(noise: str) -> None:
    weights = weights_like()
    delta = RelativeBall(radius="sphere", noise=noise).sample(weights, 0.3, 0)
    assert norm(delta) == pytest.approx(0.3 * norm(weights), rel=2 * NORM_RTOL)


@pytest.mark.parametrize("radius", ["uniform", *rest("volume")])
def test_balls_share_their_noise(radius: str) -> None:
    """From one key the relative ball is the ball times the norm of the weights."""
    weights = weights_like()
    ball = to_numpy(Ball(radius=radius).sample(weights, 1.0, 5))
    relative = to_numpy(RelativeBall(radius=radius).sample(weights, 1.0, 5))
    for a, b in zip(ball, relative, strict=True):
        # atol for no element: products and a norm are all that is rounded.
        np.testing.assert_allclose(b, a * norm(weights), rtol=2 * NORM_RTOL)


@pytest.mark.parametrize("noise", ["normal", *rest("rademacher")])
def test_layerwise_radius_is_a_share_of_each_norm(noise: str) -> None:
    weights = weights_like()
    deltas = LayerwiseBall(radius="sphere", noise=noise).sample(weights, 0.2, 0)
    for weight, delta in zip(weights, deltas, strict=True):
        assert norm([delta]) == pytest.approx(0.2 * norm([weight]), rel=2 * NORM_RTOL)


def test_layerwise_radius_is_drawn_for_each_variable() -> None:
    weights = [ops.ones((8,))] * 200
    deltas = LayerwiseBall(radius="uniform").sample(weights, 1.0, 0)
    lengths = np.array([norm([d]) for d in deltas]) / math.sqrt(8)
    assert scipy.stats.kstest(lengths, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("radius", ["sphere", *rest("volume", "uniform")])
def test_layerwise_leaves_a_zero_variable_alone(radius: str) -> None:
    weights = [ops.ones((3, 2)), ops.zeros((4,))]
    kernel, bias = to_numpy(LayerwiseBall(radius=radius).sample(weights, 0.2, 0))
    np.testing.assert_array_equal(bias, 0.0)
    assert np.all(np.isfinite(kernel)) and np.all(kernel != 0)


# Each output unit.

# Kernels of a dense, a transposed, a depthwise and an attention layer, an embedding,
# biases, a scalar, units of one weight, and weights without elements: their shapes, and
# the axes of their units.
UNITS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 3), (1,)),
    ((2, 2, 3, 4), (2,)),
    ((3, 3, 4, 2), (2, 3)),
    ((6, 2, 3), (1, 2)),
    ((7, 4), (0,)),
    ((4,), ()),
    ((2, 5), ()),
    ((), ()),
    ((1, 3), (1,)),
    ((2, 3), (0, 1)),
    ((0, 4), (1,)),
    ((4, 0), (1,)),
    # Summed by blocks.
    ((640, 250), (1,)),
    ((2, 2, 160, 250), (3,)),
]


def unit_norms(tensor: np.ndarray, unit_axes: tuple[int, ...]) -> np.ndarray:
    """The norms of all units, each taken by itself."""
    units = np.moveaxis(tensor, unit_axes, range(len(unit_axes)))
    indices = np.ndindex(units.shape[: len(unit_axes)])
    return np.array([np.linalg.norm(units[index].ravel()) for index in indices])


@pytest.mark.parametrize("noise", ["normal", *rest("rademacher")])
def test_each_unit_moves_by_a_share_of_its_norm(noise: str) -> None:
    shapes, axes = zip(*UNITS, strict=True)
    weights, ball = weights_like(shapes), FilterwiseBall(noise=noise)

    def sample(weights: Any, key: Any) -> Any:
        return ball.sample(weights, 0.2, key, units=axes)

    deltas = compile_function(sample)(weights, key(0))
    for w, d, a in zip(to_numpy(weights), to_numpy(deltas), axes, strict=True):
        assert d.shape == w.shape
        np.testing.assert_allclose(
            unit_norms(d, a), 0.2 * unit_norms(w, a), rtol=2 * NORM_RTOL
        )


@pytest.mark.parametrize("radius", ["uniform", *rest("volume")])
def test_all_units_share_one_factor(radius: str) -> None:
    """From one key delta is that of the sphere, times one u."""
    weights = weights_like(((5, 3), (4,), (5, 3)))
    sphere = to_numpy(FilterwiseBall(radius="sphere").sample(weights, 0.2, 5))
    found = to_numpy(FilterwiseBall(radius=radius).sample(weights, 0.2, 5))
    ratios = np.concatenate([(found[i] / sphere[i]).ravel() for i in range(3)])
    assert 0 < ratios[0] < 1
    np.testing.assert_allclose(ratios, ratios[0], rtol=16 * ULP)


@pytest.mark.parametrize("radius", ["uniform", *rest("volume")])
def test_the_factor_of_all_units_follows_its_distribution(radius: str) -> None:
    ball = FilterwiseBall(radius=radius)
    weights = [ops.ones((2, 2))]
    sample = compile_function(lambda key: ball.sample(weights, 1.0, key))
    deltas = [sample(key(3, step)) for step in range(400)]
    u = np.array([norm(delta) for delta in deltas]) / 2
    # The radius of a uniform point in a ball of as many dimensions as weights.
    uniform = u**4 if radius == "volume" else u
    assert scipy.stats.kstest(uniform, "uniform").pvalue > LEVEL


def test_directions_of_units_are_uniform_and_independent() -> None:
    (kernel,) = to_numpy(FilterwiseBall().sample([ops.ones((3, 20_000))], 1.0, 1))
    directions = kernel / np.linalg.norm(kernel, axis=0)
    # Archimedes: a coordinate of a uniform point on the sphere in 3 dimensions.
    for coordinate in directions:
        assert scipy.stats.kstest(coordinate, "uniform", (-1, 2)).pvalue > LEVEL
    neighbours = np.sum(directions[:, 1:] * directions[:, :-1], axis=0)
    assert scipy.stats.kstest(neighbours, "uniform", (-1, 2)).pvalue > LEVEL


@pytest.mark.parametrize("radius", ["sphere", *rest("volume", "uniform")])
def test_filterwise_leaves_a_zero_unit_alone(radius: str) -> None:
    kernel = np.ones((3, 2), "float32") * np.array([0.0, 1.0], "float32")
    weights = [ops.convert_to_tensor(kernel), ops.zeros((4,))]
    delta, bias = to_numpy(FilterwiseBall(radius=radius).sample(weights, 0.2, 0))
    np.testing.assert_array_equal(bias, 0.0)
    np.testing.assert_array_equal(delta != 0, kernel != 0)


def test_scaling_a_unit_scales_its_delta() -> None:
    (kernel,) = weights_like(((5, 3),))
    scales = [2.0**-10, 1.0, 512.0]
    ball = FilterwiseBall()
    (delta,), (scaled,) = (
        to_numpy(ball.sample([kernel * ops.array(s)], 0.2, 0)) for s in (1.0, scales)
    )
    np.testing.assert_allclose(
        scaled, delta * [2.0**-10, 1.0, 512.0], rtol=2 * NORM_RTOL
    )


def test_a_scale_before_batch_norm_changes_no_perturbed_output() -> None:
    """BatchNorm undoes the scale of each filter, at theta and at theta + delta."""
    conv = layers.Conv2D(4, 3, use_bias=False)
    batch_norm = layers.BatchNormalization(epsilon=0.0)
    model = keras.Sequential([keras.Input((8, 8, 2)), conv, batch_norm])
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32")
    kernel = model.trainable_variables[0]
    original = ops.convert_to_numpy(kernel)

    def outputs(scales: Any) -> np.ndarray:
        kernel.assign(original * scales)
        values, state = stateless.current_values(model)
        ball = FilterwiseBall()
        deltas = perturbations.sample_deltas(ball, model, values, 0.3, key(0))
        perturbed = perturbations.add_deltas(values, deltas)
        y, _ = model.stateless_call(perturbed, state, x, training=True)
        return ops.convert_to_numpy(y)

    expected = outputs(1.0)
    found = outputs(np.array([1e-2, 0.5, 3.0, 100.0], "float32"))
    # Sums of 18 products, and moments of 576 numbers, of order 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1000 * ULP)


def test_filterwise_norms_of_float16_do_not_overflow() -> None:
    """The square of a unit's norm, 4e6, is beyond float16, which ends at 65504."""
    weights = [ops.full((1000, 2), 64.0, dtype="float16")]
    (delta,) = to_numpy(FilterwiseBall().sample(weights, 0.5, 0))
    expected = 0.5 * 64 * math.sqrt(1000)
    np.testing.assert_allclose(np.linalg.norm(delta, axis=0), expected, rtol=4e-6)


def test_units_without_axes_follow_names() -> None:
    """Where `sample()` gets no `units`: tokens of an embedding, columns of a tensor."""
    ones = np.ones((4, 3), "float32") * np.arange(1, 5, dtype="float32")[:, None]
    embeddings = keras.Variable(ones, name="embeddings")
    weights = [embeddings, ops.convert_to_tensor(ones)]
    of_tokens, of_columns = to_numpy(FilterwiseBall().sample(weights, 1.0, 0))
    np.testing.assert_allclose(
        np.linalg.norm(of_tokens, axis=1), unit_norms(ones, (0,)), rtol=2 * NORM_RTOL
    )
    np.testing.assert_allclose(
        np.linalg.norm(of_columns, axis=0), unit_norms(ones, (1,)), rtol=2 * NORM_RTOL
    )
