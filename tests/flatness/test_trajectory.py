"""Planes that show trainings."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.callbacks import WeightRecorder
from keras_nrs.flatness import loss_landscape
from keras_nrs.flatness import trajectory
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn

pytestmark = pytest.mark.matrix


def model_at(weights: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(loss="mse")
    model.set_weights(weights)
    return model


def weights_at(a: float, b: float, c: float = 0.0) -> list[np.ndarray]:
    return [np.array([[a, 0.0], [0.0, b]]), np.array([c, 0.0])]


def test_three_points_on_their_plane() -> None:
    """Components of variance: 4, 4 and 0 along one weight, 0, 0 and 1 along another."""
    run = [weights_at(4, 0), weights_at(4, 1), weights_at(0, 0)]
    path = trajectory(model_at(weights_at(0, 0, c=2)), run)
    (places,) = path.paths.values()
    np.testing.assert_allclose(path.distances[""], 2, rtol=1e-6)
    gaps = [np.linalg.norm(places[i] - places[j]) for i, j in ((0, 1), (1, 2), (2, 0))]
    np.testing.assert_allclose(gaps, [1, np.sqrt(17), 4], rtol=1e-6)
    flat = np.stack([np.concatenate([p.ravel() for p in d]) for d in path.directions])
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-10)
    points = np.array([[4, 0], [4, 1], [0, 0.0]])
    variances = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    expected = variances / variances.sum()
    np.testing.assert_allclose(path.explained_variance, expected, rtol=1e-6)


def test_the_loss_on_the_plane_is_that_of_the_checkpoints() -> None:
    """The plane holds all of two points and the model."""
    x = np.array([[1.0, 2.0], [-1.0, 1.0]], "float32")
    y = np.ones((2, 2), "float32")
    final = model_at(weights_at(1, 1))
    run = [model_at(weights_at(3, 0)), model_at(weights_at(2, 3)), final]
    path = trajectory(final, run)
    np.testing.assert_allclose(path.distances[""], 0, atol=1e-6)
    first, _, last = path.paths[""]
    np.testing.assert_allclose(last, 0, atol=1e-6)
    plane = loss_landscape(
        *(final, x, y),
        directions=path.directions,
        num_points=2,
        span=[(a, a + 1) for a in first],
    )
    expected = run[0].evaluate(x, y, verbose=0)
    assert plane.losses[0, 0] == pytest.approx(expected, rel=1e-5)
    low, high = np.transpose(path.span(margin=0.5))
    assert np.all(low < path.paths[""]) and np.all(path.paths[""] < high)


def test_a_straight_run_has_a_second_direction() -> None:
    path = trajectory(
        model_at(weights_at(0, 0)), [weights_at(i, 2 * i) for i in range(3)]
    )
    np.testing.assert_allclose(path.explained_variance, [1, 0], atol=1e-10)
    flat = np.stack([np.concatenate([p.ravel() for p in d]) for d in path.directions])
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-10)
    assert all(first < last for first, last in path.span(margin=0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_forms_of_checkpoints(wrapped: bool, tmp_path: Path) -> None:
    """Files, models, recorded and all weights are the same, and change nothing."""
    x, y = image_data(16)
    base = cnn()
    model = keras_nrs.wrap(base) if wrapped else base
    model.compile("adam", base.loss)
    recorder = WeightRecorder()
    files = str(tmp_path / "{epoch}.weights.h5")
    saver = keras.callbacks.ModelCheckpoint(files, save_weights_only=True)
    model.fit(x, y, epochs=2, callbacks=[recorder, saver], verbose=0)
    assert len(recorder.weights) == 3
    all_weights = model.get_weights()
    model.save(tmp_path / "whole.keras")
    model.fit(x, y, verbose=0)
    before = numpy_values([*model.variables, *model.optimizer.variables])
    run = [
        *(tmp_path / f"{epoch}.weights.h5" for epoch in (1, 2)),
        str(tmp_path / "whole.keras"),
        all_weights,
        model,
    ]
    path = trajectory(model, {"NRS": run, "recorded": recorder.weights[1:]})
    assert_equal(numpy_values([*model.variables, *model.optimizer.variables]), before)
    first, *second, last = path.paths["NRS"]
    expected = path.paths["recorded"]
    np.testing.assert_allclose(first, expected[0], atol=1e-5)
    for place in second:
        np.testing.assert_allclose(place, expected[1], atol=1e-5)
    np.testing.assert_allclose(last, 0, atol=1e-5)


def test_a_recorder_keeps_copies() -> None:
    x, y = image_data(16)
    model = cnn()
    recorder = WeightRecorder(every=2)
    model.fit(x, y, epochs=4, callbacks=[recorder], verbose=0)
    assert len(recorder.weights) == 3
    assert not np.allclose(recorder.weights[0][0], recorder.weights[-1][0])
    assert_equal(recorder.weights[-1], numpy_values(model.trainable_variables))
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        WeightRecorder(every=0)


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ([], "at least two checkpoints"),
        ([weights_at(0, 0)], "at least two checkpoints"),
        (3, "Received: no list"),
        ({"a": 3}, "Received: no list"),
        ([weights_at(1, 1)] * 2, "that are the same"),
        ([weights_at(1, np.nan), weights_at(0, 0)], "that are not finite"),
        ([weights_at(1, 1), [np.zeros(3)]], "with the weights of `model`"),
        ([weights_at(1, 1), 3], "with the weights of `model`"),
    ],
)
def test_bad_checkpoints(checkpoints: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory(model_at(weights_at(0, 0)), checkpoints)
