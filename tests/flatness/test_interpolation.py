"""Losses on paths between two models."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.flatness import Curve
from keras_nrs.flatness import Landscape
from keras_nrs.flatness import interpolate
from tests.support.arrays import to_numpy
from tests.support.data import image_data
from tests.support.networks import cnn

pytestmark = pytest.mark.matrix


def loss_of(model: Any, x: Any, y: Any) -> float:
    value: float = model.evaluate(x, y, verbose=0)[0]
    return value


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


def test_statistics_of_batch_norm_on_the_path() -> None:
    """By default they are interpolated as well, and so not the network's."""
    x, y = image_data(32)
    first, second, middle = cnn(), cnn(), cnn()
    for model in (first, second):
        model.fit(x, y, verbose=0)
    for v, a, b in zip(
        middle.variables, first.variables, second.variables, strict=True
    ):
        if keras.backend.is_float_dtype(v.dtype):
            v.assign((to_numpy(a) + to_numpy(b)) / 2)
    options: Any = {"num_points": 3, "span": (0, 1)}
    line = interpolate(first, second, x, y, **options)
    assert line.losses[1] == pytest.approx(loss_of(middle, x, y), rel=1e-5)
    line = interpolate(first, second, x, y, batch_norm_data=x, **options)
    keras_nrs.update_batch_norm(middle, x)
    assert line.losses[1] == pytest.approx(loss_of(middle, x, y), rel=1e-5)


def test_the_barrier_is_above_the_line_between_both_losses() -> None:
    t = np.linspace(-1, 2, 7)
    path = Landscape(coordinates=(t,), losses=np.array([9, 9, 1, 4, 2, 9, 9.0]))
    assert path.barrier() == pytest.approx(4 - 1.5)
    low = Landscape(coordinates=(t,), losses=np.array([9, 9, 1, 0, 2, 9, 9.0]))
    assert low.barrier() == 0
    plane = Landscape(coordinates=(t, t), losses=np.zeros((7, 7)))
    for other in (plane, Landscape(coordinates=(t + 0.1,), losses=t)):
        with pytest.raises(ValueError, match="points at both models, 0 and 1"):
            other.barrier()


def test_a_checkpoint_of_another_path(tmp_path: Path) -> None:
    """From the same model to another one, or along a curve to the same one."""
    x, y = image_data(8)
    model, other, third = cnn(), cnn(), cnn()
    options: Any = {"num_points": 3, "span": (0, 1), "checkpoint": tmp_path / "a.npz"}
    interpolate(model, other, x, y, **options)
    interpolate(model, other, x, y, **options)
    line = Curve.line(model, other)
    curve = Curve(start=line.start, control=line.end, end=line.end)
    for end, path in ((third, None), (other, curve)):
        with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
            interpolate(model, end, x, y, curve=path, **options)


def test_a_curve_of_another_model() -> None:
    x, y = image_data(8)
    other = cnn(batch_norm=False)
    for curve in (3, Curve.line(other, other)):
        with pytest.raises(ValueError, match="`curve` must be a Curve"):
            interpolate(cnn(), cnn(), x, y, curve=curve)  # type: ignore[arg-type]
    model, other = cnn(), cnn()
    curve = Curve.line(model, other)
    for ends, name in (((model, cnn()), "other"), ((other, model), "model")):
        with pytest.raises(ValueError, match=f"not the weights of `{name}`"):
            interpolate(*ends, x, y, curve=curve)


def test_models_that_are_frozen_otherwise() -> None:
    """Though all shapes together are the same."""

    def stack() -> keras.Model:
        model = keras.Sequential([keras.Input((2,)), *map(keras.layers.Dense, (2, 2))])
        model.compile(loss="mse")
        return model

    frozen, x = stack(), np.zeros((4, 2), "float32")
    frozen.layers[0].trainable = False
    with pytest.raises(ValueError, match="or frozen ones"):
        interpolate(stack(), frozen, x, x)
