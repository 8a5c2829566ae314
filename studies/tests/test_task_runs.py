"""The runs of a task: equal starts, no test sample before the test."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.experiments import demo
from studies.arms import NRS
from studies.study_tasks import TASKS
from studies.study_tasks import Task
from studies.task_runs import DivergenceTarget
from studies.task_runs import TaskRuns
from studies.task_runs import calibration_error
from studies.tests.tiny import ARMS
from studies.tests.tiny import TASK

# Nothing here depends on the backend; this one starts soonest.
pytestmark = [pytest.mark.only_torch, pytest.mark.usefixtures("tiny")]


@pytest.mark.parametrize("data", ["digits", "sequences"])
def test_a_step_of_each_cnn(data: str) -> None:
    task = next(t for t in TASKS if (t.data, t.network) == (data, "cnn"))
    train, _ = task.training_data(0)
    model = task.build()
    model.compile("sgd", demo.crossentropy())
    wrapped = keras_nrs.wrap(model, 0.3, perturbation="relative")
    history = wrapped.fit(train.x[:10], train.y[:10], verbose=0).history
    assert np.isfinite(history["loss"][0])


def test_no_test_sample_is_loaded_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Task) -> None:
        raise AssertionError("test samples")

    monkeypatch.setattr(Task, "test_data", fail)
    monkeypatch.setattr(TaskRuns, "_train", lambda *args: {})
    runs = TaskRuns(TASK, tmp_path)
    assert set(runs.choose(NRS)) == {*("learning_rate", "weight_decay", "eps", "alpha")}


def test_the_best_validation_accuracy_is_chosen_and_the_loss_breaks_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validate(self: Any, name: str, settings: Any, seed: int) -> Any:
        if name == demo.BASELINE:
            accuracy = 0.7 if settings["learning_rate"] == 1e-2 else 0.6
            return {"validation_accuracy": accuracy, "validation_loss": 1.0}
        loss = 0.4 if settings["eps"] == 0.3 else 0.5
        return {"validation_accuracy": 0.8, "validation_loss": loss}

    monkeypatch.setattr(TaskRuns, "_validate", validate)
    runs = TaskRuns(TASK, tmp_path)
    assert runs.choose(demo.BASELINE)["learning_rate"] == 1e-2
    assert runs.choose(NRS)["eps"] == 0.3


def test_arms_start_from_the_same_weights_and_see_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class History:
        history = {"model_divergence": [0.0]}

    def fit(self: Any, batches: Any, **kwargs: Any) -> Any:
        seen.append([*demo.base_model(self).get_weights(), *next(batches)])
        return History

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(keras_nrs.NRSModel, "fit", fit)
    runs = TaskRuns(TASK, tmp_path)
    train, _ = TASK.training_data(0)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1}
    for arm in ARMS.values():
        runs._train(arm, settings, train, 0)
    assert len(seen) == 4
    for others in seen[1:]:
        for first, other in zip(seen[0], others, strict=True):
            np.testing.assert_array_equal(first, other)


def test_calibration_error() -> None:
    # Two samples of confidence 0.9, one correct: a gap of 0.4. Two of 0.6, both
    # correct: 0.4. One of 1.0 is right.
    confidence = np.array([0.9, 0.9, 0.6, 0.6, 1.0])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 1, 0, 0, 0])
    expected = (2 * 0.4 + 2 * 0.4) / 5
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


def test_a_diverged_training_is_at_chance(tmp_path: Path) -> None:
    runs = TaskRuns(TASK, tmp_path)
    runs._network.set_weights([w + np.nan for w in runs._network.get_weights()])
    measured = runs._evaluate(TASK.test_data())
    assert measured == {"accuracy": 1 / 3, "loss": np.inf}


def test_eps_follows_the_target() -> None:
    model = TASK.build()
    model.compile("sgd", demo.crossentropy())
    model = keras_nrs.wrap(model, 0.1, perturbation="relative")
    callback = DivergenceTarget(0.04)
    callback.set_model(model)
    for divergence, expected in ((0.01, 0.2), (0.08, 0.2 / 2**0.5), (1e-9, 0.2828)):
        callback.on_epoch_end(0, {"model_divergence": divergence})
        eps = float(keras.ops.convert_to_numpy(model.eps))
        assert eps == pytest.approx(expected, rel=1e-3)
    for _ in range(3):
        callback.on_epoch_end(0, {"model_divergence": 0.0})
    assert float(keras.ops.convert_to_numpy(model.eps)) == pytest.approx(0.5)
