import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.flatness import Landscape
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import landscape as module
from keras_nrs.flatness import loss_landscape
from keras_nrs.flatness import random_direction
from keras_nrs.flatness.data_loss import DataLoss
from tests.support.arrays import to_numpy
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn


def loss_of(model: Any, x: Any, y: Any) -> float:
    value: float = model.evaluate(x, y, verbose=0)[0]
    return value


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


@pytest.mark.matrix
def test_each_direction_may_have_a_span() -> None:
    x, y = image_data(8)
    plane = loss_landscape(cnn(), x, y, num_points=2, span=[(0, 1), (-2, 3)])
    np.testing.assert_array_equal(plane.coordinates, [[0, 1], [-2, 3]])


def test_statistics_of_batch_norm_are_measured_at_each_point() -> None:
    x, y = image_data(40)
    model = cnn()
    model.fit(x, y, verbose=0)
    before = numpy_values(model.variables)
    line = loss_landscape(
        model, x, y, directions=1, num_points=3, batch_norm_data=x, batch_size=20
    )
    assert_equal(numpy_values(model.variables), before)
    moved = random_direction(model, seed=0)
    for v, d in zip(model.trainable_variables, moved, strict=True):
        v.assign(to_numpy(v) + d)
    assert line.losses[2] != pytest.approx(loss_of(model, x, y), rel=1e-3)
    keras_nrs.update_batch_norm(model, x, batch_size=20)
    assert line.losses[2] == pytest.approx(loss_of(model, x, y), rel=1e-5)


@pytest.mark.matrix
def test_moments_have_the_precision_of_the_weights() -> None:
    """In mixed precision too, after moments in training's precision."""
    x, y = image_data(40)
    plain = cnn()
    plain.fit(x, y, verbose=0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = cnn()
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(plain.get_weights())
    keras_nrs.update_batch_norm(mixed, x)
    lines = [
        loss_landscape(m, x, y, directions=1, num_points=3, batch_norm_data=x)
        for m in (plain, mixed)
    ]
    np.testing.assert_allclose(lines[1].losses, lines[0].losses, rtol=1e-6)


@pytest.mark.matrix
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


@pytest.mark.matrix
def test_a_stopped_landscape_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = image_data(16)
    model = cnn()
    path = tmp_path / "new" / "landscape.npz"
    options = {"num_points": 3, "directions": 2}
    expected = loss_landscape(model, x, y, **options)
    calls: list[int] = []

    class Counted(DataLoss):
        def __call__(self, values: Any) -> float:
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return super().__call__(values)

    monkeypatch.setattr(module, "DataLoss", Counted)
    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, x, y, checkpoint=path, **options)
    assert np.isfinite(Landscape.load(path).losses).sum() == 4
    again = loss_landscape(model, x, y, checkpoint=path, **options)
    np.testing.assert_array_equal(again.losses, expected.losses)
    # Five points were missing, and three were measured again.
    assert len(calls) == 5 + 8
    with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
        loss_landscape(model, x + 1, y, checkpoint=path, **options)
    with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
        loss_landscape(model, x, y, checkpoint=path, num_points=5)
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"not as Landscape\.save"):
        loss_landscape(model, x, y, checkpoint=path, **options)


@pytest.mark.matrix
def test_overflow_is_infinite() -> None:
    x, y = image_data(16)
    line = loss_landscape(cnn(), x, y, directions=1, num_points=2, span=(-1e30, 1e30))
    assert not np.isnan(line.losses).any()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 1}, "`num_points` must be an integer >= 2"),
        ({"span": (1, -1)}, "`span` must be two numbers"),
        ({"span": 1}, "`span` must be two numbers"),
        ({"span": [(0, 1), (1, 0)]}, "`span` must be two numbers"),
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
