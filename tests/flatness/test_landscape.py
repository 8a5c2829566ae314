import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.flatness import Landscape
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import interpolate
from keras_nrs.flatness import landscape as module
from keras_nrs.flatness import loss_landscape
from keras_nrs.flatness import random_direction
from tests.support.arrays import to_numpy
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn


def loss_of(model: Any, x: Any, y: Any) -> float:
    value: float = model.evaluate(x, y, verbose=0)[0]
    return value


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


def test_neighbouring_seeds_share_no_direction() -> None:
    model = cnn()
    directions = [
        random_direction(model, seed=seed, index=index)[0].ravel()
        for seed in (0, 1)
        for index in (0, 1)
    ]
    cosines = np.corrcoef(directions) - np.eye(4)
    assert np.abs(cosines).max() < 5 / np.sqrt(len(directions[0]))


def test_random_directions_do_not_repeat_an_initialization() -> None:
    """Of NumPy's generator with the same seed, as the digits' demo has it."""
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(30)])
    kernel, _ = model.trainable_variables
    kernel.assign(np.random.default_rng(0).standard_normal(kernel.shape))
    direction, _ = random_direction(model, seed=0)
    cosine = np.corrcoef(direction.ravel(), to_numpy(kernel).ravel())[0, 1]
    assert abs(cosine) < 4 / 30  # 4 standard deviations of 900 independent numbers


def test_losses_are_those_of_evaluate() -> None:
    """At every point, with penalties, dropout and BatchNorm in inference mode."""
    x, y = image_data(40)
    model = cnn(penalty=0.1, dropout=0.5, seed=0)
    model.fit(x[:32], y[:32], verbose=0)
    before = numpy_values(model.variables)
    landscape = loss_landscape(model, x, y, num_points=3, span=(-0.5, 1.0), seed=1)
    assert_equal(numpy_values(model.variables), before)
    assert landscape.losses.shape == (3, 3)
    np.testing.assert_allclose(landscape.coordinates, 2 * [[-0.5, 0.25, 1.0]])
    directions = [random_direction(model, seed=1, index=i) for i in range(2)]
    theta = [to_numpy(v).copy() for v in model.trainable_variables]
    for i, a in enumerate(landscape.coordinates[0]):
        for j, b in enumerate(landscape.coordinates[1]):
            for v, w, d1, d2 in zip(
                model.trainable_variables, theta, *directions, strict=True
            ):
                v.assign(w + a * d1 + b * d2)
            expected = loss_of(model, x, y)
            assert landscape.losses[i, j] == pytest.approx(expected, rel=1e-5)


def test_along_an_eigenvector_the_loss_is_a_parabola() -> None:
    x, y = image_data(32)
    model = cnn()
    result = hessian_eigenvalues(model, x, y, return_eigenvectors=True)
    assert result.eigenvectors
    line = loss_landscape(
        model, x, y, directions=result.eigenvectors, num_points=3, span=(-0.05, 0.05)
    )
    left, middle, right = line.losses
    curvature = (left - 2 * middle + right) / 0.05**2
    assert curvature == pytest.approx(result.eigenvalues[0], rel=0.02)


def test_interpolation_ends_at_both_models() -> None:
    x, y = image_data(32)
    first, second = cnn(), cnn()
    for model in (first, second):
        model.fit(x, y, verbose=0)
    line = interpolate(first, second, x, y, num_points=3, span=(0, 1))
    assert line.losses[0] == pytest.approx(loss_of(first, x, y), rel=1e-5)
    assert line.losses[2] == pytest.approx(loss_of(second, x, y), rel=1e-5)
    with pytest.raises(ValueError, match="`other` must have variables of the same"):
        interpolate(first, cnn(batch_norm=False), x, y)


def test_a_stopped_landscape_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = image_data(16)
    model = cnn()
    path = tmp_path / "new" / "landscape.npz"
    options = {"num_points": 3, "directions": 2}
    expected = loss_landscape(model, x, y, **options)
    make = module._loss_function
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        loss_at = make(*args)

        def at(values: Any) -> float:
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return loss_at(values)

        return at

    monkeypatch.setattr(module, "_loss_function", counted)
    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, x, y, checkpoint=path, **options)
    assert np.isfinite(Landscape.load(path).losses).sum() == 4
    again = loss_landscape(model, x, y, checkpoint=path, **options)
    np.testing.assert_array_equal(again.losses, expected.losses)
    # Five points were missing, and one was measured again.
    assert len(calls) == 5 + 6
    with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
        loss_landscape(model, x + 1, y, checkpoint=path, **options)
    with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
        loss_landscape(model, x, y, checkpoint=path, num_points=5)
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"not as Landscape\.save"):
        loss_landscape(model, x, y, checkpoint=path, **options)


def test_overflow_is_infinite() -> None:
    x, y = image_data(16)
    line = loss_landscape(cnn(), x, y, directions=1, num_points=2, span=(-1e30, 1e30))
    assert not np.isnan(line.losses).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 1}, "`num_points` must be an integer >= 2"),
        ({"span": (1, -1)}, "`span` must be two numbers"),
        ({"span": 1}, "`span` must be two numbers"),
        ({"directions": 3}, "`directions` must be an integer from 1 to 2"),
        ({"directions": [[np.ones(2)]]}, "`directions` must be 1, 2, or a list"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    x, y = image_data(16)
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_landscape(cnn(), x, y, **options)


@pytest.mark.only_torch
def test_a_flipped_bit_changes_nothing_or_is_found(tmp_path: Path) -> None:
    """Whichever bit of the file it is."""
    path, rng = tmp_path / "landscape.npz", np.random.default_rng(0)
    whole = Landscape(coordinates=(np.arange(3.0),), losses=rng.normal(size=3))
    whole.save(path)
    data, found = path.read_bytes(), 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = Landscape.load(path)
        except ValueError as error:
            assert f"{path}' is damaged" in str(error)
            found += 1
            continue
        np.testing.assert_array_equal(loaded.losses, whole.losses)
        np.testing.assert_array_equal(loaded.coordinates, whole.coordinates)
    assert found > len(data) / 2
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is damaged"):
            Landscape.load(path)
