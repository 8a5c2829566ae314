"""The mean and the largest increase of the loss around the weights."""

import tracemalloc
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.divergence_meter import keys_of_samples
from keras_nrs.flatness import sharpness
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations import RelativeBall
from tests.support.arrays import to_numpy
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn


def regression(units: int = 1) -> tuple[keras.Model, Any, Any, np.ndarray]:
    """A linear model at its minimum, data, and A: the loss is `delta.T A delta`.

    For several units it is the mean over these.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * np.array([2, 1, 0.5])
    layer = keras.layers.Dense(units, use_bias=False)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(loss="mse")
    model.set_weights([rng.normal(size=(3, units))])
    x = x.astype("float32")
    return model, x, x @ to_numpy(layer.kernel), x.T @ x / len(x)


def test_increases_of_a_quadratic_loss() -> None:
    """At each draw delta.T A delta; at most eps ** 2 times A's largest eigenvalue."""
    model, x, y, matrix = regression()
    ball = Ball(radius="sphere")
    before = numpy_values(model.variables)
    result = sharpness(
        *(model, x, y),
        eps=0.5,
        perturbation=ball,
        num_samples=40,
        num_steps=20,
        batch_size=4,
        seed=3,
    )
    assert_equal(numpy_values(model.variables), before)
    assert result.loss == pytest.approx(0, abs=1e-10)
    theta = [v.value for v in model.trainable_variables]
    for key, value in zip(keys_of_samples(3, 40), result.values, strict=True):
        delta = to_numpy(ball.sample(theta, 0.5, key)[0])[:, 0]
        assert value == pytest.approx(delta @ matrix @ delta, rel=1e-4)
    expected = 0.5**2 * np.trace(matrix) / 3
    low, high = result.mean_interval
    assert low < result.mean_increase < high
    assert abs(result.mean_increase - expected) < 2 * (high - low)
    largest = 0.5**2 * np.linalg.eigvalsh(matrix)[-1]
    assert result.largest_increase == pytest.approx(largest, rel=1e-3)
    # From theta there is no gradient to follow.
    np.testing.assert_allclose(result.by_start[1:], largest, rtol=1e-3)
    assert result.relative_increase == pytest.approx(100 * largest, rel=1e-3)
    low, high = result.largest_interval
    assert low < result.largest_increase < high


def test_one_step_is_that_of_sam() -> None:
    """The loss at theta + radius * g / norm(g)."""
    model, x, y, matrix = regression()
    shift = np.array([0.3, -0.2, 0.5])
    theta = to_numpy(model.trainable_variables[0])[:, 0] + shift
    model.set_weights([theta[:, None]])
    result = sharpness(
        *(model, x, y),
        eps=0.01,
        perturbation=RelativeBall(),
        num_samples=1,
        num_starts=1,
        num_steps=1,
    )
    clean = shift @ matrix @ shift
    gradient = 2 * matrix @ shift
    radius = 0.01 * np.linalg.norm(theta)
    moved = shift + radius * gradient / np.linalg.norm(gradient)
    expected = moved @ matrix @ moved - clean
    assert result.loss == pytest.approx(clean, rel=1e-5)
    assert result.largest_increase == pytest.approx(expected, rel=1e-3)
    assert np.isnan(result.mean_interval).all()
    # Two batches are too few for a bootstrap.
    assert np.isnan(result.largest_interval).all()


@pytest.mark.parametrize("name", ["filterwise", *rest("layerwise", "relative")])
def test_the_balls_of_perturbations(name: str) -> None:
    """Of each unit its own radius; of each variable, or of all weights, one."""
    model, x, y, matrix = regression(2)
    theta = to_numpy(model.trainable_variables[0])
    result = sharpness(
        model, x, y, eps=0.2, perturbation=name, num_samples=4, num_steps=30
    )
    squares = np.sum(theta**2)
    expected = 0.2**2 * squares * np.linalg.eigvalsh(matrix)[-1] / 2
    assert result.largest_increase == pytest.approx(expected, rel=1e-3)
    assert result.values.max() < result.largest_increase


@pytest.mark.matrix
def test_scales_that_batch_norm_undoes_do_not_count() -> None:
    x, y = image_data(64)
    model = cnn()
    model.fit(x, y, epochs=3, verbose=0)
    kernels_alone = FilterwiseBall(where="kernels")

    def measured() -> keras_nrs.flatness.Sharpness:
        return sharpness(
            *(model, x, y),
            eps=0.1,
            perturbation=kernels_alone,
            num_samples=3,
            num_starts=2,
            num_steps=2,
            batch_norm_data=x,
            batch_size=32,
        )

    before = measured()
    for variable in model.layers[0].trainable_variables:
        variable.assign(8 * to_numpy(variable))
    after = measured()
    # Its epsilon is 0.001 of a variance of 1 or so.
    np.testing.assert_allclose(after.values, before.values, rtol=0.05, atol=1e-3)
    assert after.largest_increase == pytest.approx(before.largest_increase, rel=0.05)


class Fixed(keras_nrs.perturbations.Perturbation):
    """Of which only its draws are known."""

    def sample(self, weights: Any, eps: Any, rng: Any) -> list[Any]:
        return [eps * keras.ops.ones_like(w) for w in weights]


@pytest.mark.matrix
def test_a_users_perturbation_has_the_ball_that_holds_it() -> None:
    model, x, y, matrix = regression()
    result = sharpness(
        model, x, y, eps=0.1, perturbation=Fixed(), num_samples=2, num_steps=20
    )
    ones = np.full(3, 0.1)
    np.testing.assert_allclose(result.values, ones @ matrix @ ones, rtol=1e-4)
    largest = 3 * 0.1**2 * np.linalg.eigvalsh(matrix)[-1]
    assert result.largest_increase == pytest.approx(largest, rel=1e-3)


class OtherOrder(keras.utils.PyDataset):
    """Batches that each pass has in another order."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self._batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)]
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]

    def on_epoch_begin(self) -> None:
        self._rng.shuffle(self._batches)


@pytest.mark.matrix
def test_the_interval_of_data_that_shuffle() -> None:
    """It is of the increases, and not of what batches differ in."""
    model, x, y, _ = regression()
    y = y + np.random.default_rng(1).normal(size=y.shape).astype("float32")
    options: Any = {"eps": 0.01, "num_samples": 2, "num_starts": 1}
    ordered = sharpness(model, x, y, batch_size=4, **options)
    shuffled = sharpness(model, OtherOrder(x, y), **options)
    assert shuffled.largest_increase == pytest.approx(ordered.largest_increase)
    # 1,000 samples of batches in another order give ends a little elsewhere.
    width = np.ptp(ordered.largest_interval)
    np.testing.assert_allclose(
        shuffled.largest_interval, ordered.largest_interval, atol=0.2 * width
    )


@pytest.mark.matrix
def test_an_overflow_has_no_interval() -> None:
    model, x, y, _ = regression()
    result = sharpness(
        model, x, y, eps=1e25, perturbation="ball", num_samples=3, batch_size=4
    )
    assert result.mean_increase == result.largest_increase == np.inf
    assert np.isnan([*result.mean_interval, *result.largest_interval]).all()


@pytest.mark.matrix
def test_memory_does_not_grow_with_the_samples() -> None:
    layer = keras.layers.Dense(50_000, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(loss="mse")
    x, y = np.ones((1, 1), "float32"), np.zeros((1, 50_000), "float32")
    options: Any = {"eps": 0.1, "num_starts": 1, "num_steps": 1}
    sharpness(model, x, y, num_samples=1, **options)
    tracemalloc.start()
    try:
        sharpness(model, x, y, num_samples=40, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 20 of 40 perturbations in float64.
    assert peak < 20 * 50_000 * 8


@pytest.mark.matrix
def test_nothing_rises_at_eps_0() -> None:
    x, y = image_data(16)
    result = sharpness(cnn(), x, y, eps=0.0, num_samples=2)
    np.testing.assert_allclose(result.values, 0, atol=1e-6)
    assert result.largest_increase == pytest.approx(0, abs=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "`eps` must be finite and >= 0"),
        ({"perturbation": "ascent"}, "`perturbation` must be a random one"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1"),
        ({"num_starts": 18}, "`num_starts` must be an integer from 1 to 17"),
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, x, y, _ = regression()
    with pytest.raises(ValueError, match=message):
        sharpness(model, x, y, **({"eps": 0.1} | options))
