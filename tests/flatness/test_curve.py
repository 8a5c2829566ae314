"""Curves of low loss between two models."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.flatness import Curve
from keras_nrs.flatness import connect
from keras_nrs.flatness import interpolate
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn

X, Y = np.ones((1, 1), "float32"), np.zeros((1, 1), "float32")


def linear(weight: float) -> keras.Model:
    """Whose loss on `X` and `Y` is the square of its weight."""
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(loss="mse")
    model.set_weights([np.full((1, 1), weight)])
    return model


def test_one_step_follows_the_gradient() -> None:
    """d L(phi(t)) / d control = 2 phi(t) * 2 t (1 - t)."""
    first, second = linear(1.0), linear(3.0)
    optimizer = keras.optimizers.SGD(0.1)
    curve = connect(first, second, X, Y, epochs=1, optimizer=optimizer, seed=4)
    t = np.random.default_rng(4).uniform()
    share = 2 * t * (1 - t)
    at = (1 - t) ** 2 * 1 + share * 2 + t**2 * 3
    assert curve.control[0].item() == pytest.approx(2 - 0.1 * 2 * at * share, rel=1e-5)
    assert not optimizer.built
    assert [p[0].item() for p in (curve.start, curve.end)] == [1, 3]


@pytest.mark.matrix
def test_an_optimizer_that_scales_the_loss() -> None:
    """As that of a model in mixed precision, which divides gradients by its scale."""
    plain = keras.optimizers.SGD(0.1)
    scaled = keras.optimizers.SGD(0.1, loss_scale_factor=64.0)
    moved = [
        connect(linear(1.0), linear(3.0), X, Y, epochs=3, optimizer=optimizer)
        for optimizer in (plain, scaled, keras.optimizers.LossScaleOptimizer(plain))
    ]
    for curve in moved[1:]:
        np.testing.assert_allclose(curve.control, moved[0].control, rtol=1e-6)


@pytest.mark.matrix
def test_the_control_point_that_minimizes_the_mean() -> None:
    """-1.5 between 1 and 1: minus the integral of b (1 - b) by that of b ** 2.

    b is 2 t (1 - t). Steps at random t leave a deviation of about 0.07.
    """
    curve = connect(
        *(linear(1.0), linear(1.0), X, Y),
        epochs=120,
        optimizer=keras.optimizers.SGD(0.2),
    )
    assert curve.control[0].item() == pytest.approx(-1.5, abs=0.3)
    path = interpolate(
        linear(1.0), linear(1.0), X, Y, num_points=3, span=(0, 1), curve=curve
    )
    middle = 0.5 + 0.5 * curve.control[0].item()
    np.testing.assert_allclose(path.losses, [1, middle**2, 1], rtol=1e-4)


@pytest.mark.matrix
def test_a_line_is_a_curve() -> None:
    line = Curve.line(linear(1.0), linear(3.0))
    points = [point[0].item() for point in line.points(5)]
    np.testing.assert_allclose(points, [1, 1.5, 2, 2.5, 3])


@pytest.mark.matrix
def test_networks_stay_as_they_are() -> None:
    """With BatchNorm, dropout and penalties, in training mode."""
    x, y = image_data(24)
    first, second = (cnn(dropout=0.3, penalty=0.01, seed=i) for i in (0, 1))
    for model in (first, second):
        model.fit(x, y, verbose=0)
    before = numpy_values(first.variables + second.variables)
    curve = connect(first, second, x, y, epochs=1, batch_size=12)
    assert_equal(numpy_values(first.variables + second.variables), before)
    assert all(np.isfinite(part).all() for part in curve.control)
    line = Curve.line(first, second)
    assert any(
        not np.allclose(a, b) for a, b in zip(curve.control, line.control, strict=True)
    )


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an integer >= 1"),
        ({"optimizer": "a"}, "optimizer"),
        ({"other": "cnn"}, "`other` must have variables of the same shapes"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    other = cnn() if options.pop("other", None) else linear(1.0)
    with pytest.raises(ValueError, match=message):
        connect(linear(1.0), other, X, Y, **options)
