"""The study: what chooses settings sees no test sample, and no run is done twice."""

from itertools import combinations
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.experiments import demo
from keras_nrs.experiments import study
from keras_nrs.experiments.study_tasks import TASKS
from keras_nrs.experiments.study_tasks import Task

TASK = Task(
    data="wine",
    network="mlp",
    train_samples=40,
    validation_samples=50,
    test_samples=78,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds, four steps, few arms."""
    monkeypatch.setattr(study, "EPOCHS", 2)
    monkeypatch.setattr(study, "STEPS_PER_EPOCH", 2)
    monkeypatch.setattr(study, "CHOICE_SEEDS", range(1000, 1002))
    monkeypatch.setattr(study, "TEST_SEEDS", range(2))
    grid = study.grid(learning_rate=(1e-3, 1e-2), weight_decay=(0.1,))
    arms = {
        demo.BASELINE: study._arm(grid, scheme=None),
        study.NRS: study._arm(study.grid(eps=(0.1, 0.3), alpha=(2.0,))),
        "ball": study._arm(
            study.grid(eps=(1.0, 2.0)), perturbation="ball", alpha_of=study.NRS
        ),
        study.ADAPTED: study._arm(study.grid(target=(0.1,), alpha=(1.0,))),
    }
    monkeypatch.setattr(study, "ARMS", arms)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_are_disjoint(task: Task) -> None:
    train, validation = task.training_data(3)
    parts = [train, validation, task.test_data()]
    sizes = task.train_samples, task.validation_samples, task.test_samples
    assert [len(part.x) for part in parts] == list(sizes)
    assert [len(part.y) for part in parts] == list(sizes)
    # Two of the digits' images are equal to others.
    for first, second in combinations(parts, 2):
        shared = {x.tobytes() for x in first.x} & {x.tobytes() for x in second.x}
        assert len(shared) <= 2 * (task.data == "digits")
    assert all(set(part.y) == set(parts[2].y) for part in parts)


def test_test_samples_are_the_same_for_all_seeds_and_training_samples_are_not() -> None:
    np.testing.assert_array_equal(TASK.test_data().x, TASK.test_data().x)
    (first, _), (again, _), (other, _) = map(TASK.training_data, (0, 0, 1))
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


def test_tables_are_standardized_without_the_test_samples() -> None:
    train, validation = TASK.training_data(0)
    pool = np.concatenate([train.x, validation.x])
    # 90 of the pool's 100 rows.
    np.testing.assert_allclose(pool.mean(axis=0), 0, atol=0.2)
    assert abs(TASK.test_data().x.mean(axis=0)).max() > 0.05


# Larger ViTs have tests of their own.
@pytest.mark.parametrize("data", ["digits", "sequences"])
def test_a_step_of_each_cnn(data: str) -> None:
    task = next(t for t in TASKS if (t.data, t.network) == (data, "cnn"))
    train, _ = task.training_data(0)
    model = task.build()
    model.compile("sgd", study._loss())
    wrapped = keras_nrs.wrap(model, 0.3, perturbation="relative")
    history = wrapped.fit(train.x[:10], train.y[:10], verbose=0).history
    assert np.isfinite(history["loss"][0])


def test_a_task_from_choice_to_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"rule: fixed eps": {"eps": 0.2, "alpha": 1.0}}
    study.run_task(TASK, tmp_path, rules)
    rows = study.read_rows(tmp_path / "wine-mlp-40.csv")
    tested = [row for row in rows if row["stage"] == "test"]
    names = [demo.BASELINE, study.NRS, "ball", study.ADAPTED, "rule: fixed eps"]
    assert [row["arm"] for row in tested] == [n for n in names for _ in range(2)]
    for row in tested:
        assert row["dataset"] == "wine-40"
        assert 0 <= row["test_accuracy"] <= 1
        assert 0 <= row["test_calibration_error"] <= 1
        for name in ("test_loss", "model_divergence", "eigenvalue"):
            assert row[name] > 0
        assert row["eigenvalue"] >= row["last_layer_eigenvalue"] * (1 - 1e-4)
    # All share the baseline's settings, and the ball takes the alpha of NRS.
    assert len({(row["learning_rate"], row["weight_decay"]) for row in tested}) == 1
    assert {row["alpha"] for row in tested if row["arm"] == "ball"} == {2.0}
    chosen = [row for row in rows if row["stage"] == "choice"]
    assert {row["seed"] for row in chosen} == {1000, 1001}
    assert not any("test_accuracy" in row for row in chosen)

    def fail(*args: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(study.TaskRuns, "_train", fail)
    study.run_task(TASK, tmp_path, rules)
    assert study.read_rows(tmp_path / "wine-mlp-40.csv") == rows


def test_a_stopped_task_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def stop_after_five(self: Any, arm: Any, settings: Any, *args: Any) -> Any:
        if len(trained) == 5:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append((arm.perturbation, str(settings), args[-1]))
        return {}

    monkeypatch.setattr(study.TaskRuns, "_train", stop_after_five)
    monkeypatch.setattr(study.TaskRuns, "_flatness", lambda *args: {})
    with pytest.raises(KeyboardInterrupt):
        study.run_task(TASK, tmp_path, {})
    assert len(study.read_rows(tmp_path / "wine-mlp-40.csv")) == 5
    study.run_task(TASK, tmp_path, {})
    # 2, 2 and 2 settings are compared with 2 seeds each, 4 arms tested with 2.
    assert len(trained) == 3 * 2 * 2 + 4 * 2 + 1
    assert len(study.read_rows(tmp_path / "wine-mlp-40.csv")) == 3 * 2 * 2 + 4 * 2


def test_no_test_sample_is_loaded_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Task) -> None:
        raise AssertionError("test samples")

    monkeypatch.setattr(Task, "test_data", fail)
    monkeypatch.setattr(study.TaskRuns, "_train", lambda *args: {})
    runs = study.TaskRuns(TASK, tmp_path)
    assert set(runs.choose(study.NRS)) == {
        *("learning_rate", "weight_decay", "eps", "alpha")
    }


def test_the_best_validation_accuracy_is_chosen_and_the_loss_breaks_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validate(self: Any, name: str, settings: Any, seed: int) -> Any:
        if name == demo.BASELINE:
            accuracy = 0.7 if settings["learning_rate"] == 1e-2 else 0.6
            return {"validation_accuracy": accuracy, "validation_loss": 1.0}
        loss = 0.4 if settings["eps"] == 0.3 else 0.5
        return {"validation_accuracy": 0.8, "validation_loss": loss}

    monkeypatch.setattr(study.TaskRuns, "_validate", validate)
    runs = study.TaskRuns(TASK, tmp_path)
    assert runs.choose(demo.BASELINE)["learning_rate"] == 1e-2
    assert runs.choose(study.NRS)["eps"] == 0.3


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
    runs = study.TaskRuns(TASK, tmp_path)
    train, _ = TASK.training_data(0)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1}
    for arm in study.ARMS.values():
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
    assert study.calibration_error(probabilities, labels) == pytest.approx(expected)


def test_a_diverged_training_is_at_chance(tmp_path: Path) -> None:
    runs = study.TaskRuns(TASK, tmp_path)
    runs._network.set_weights([w + np.nan for w in runs._network.get_weights()])
    measured = runs._evaluate(TASK.test_data())
    assert measured == {"accuracy": 1 / 3, "loss": np.inf}


def test_eps_follows_the_target() -> None:
    model = TASK.build()
    model.compile("sgd", study._loss())
    model = keras_nrs.wrap(model, 0.1, perturbation="relative")
    callback = study.DivergenceTarget(0.04)
    callback.set_model(model)
    for divergence, expected in ((0.01, 0.2), (0.08, 0.2 / 2**0.5), (1e-9, 0.2828)):
        callback.on_epoch_end(0, {"model_divergence": divergence})
        eps = float(keras.ops.convert_to_numpy(model.eps))
        assert eps == pytest.approx(expected, rel=1e-3)
    for _ in range(3):
        callback.on_epoch_end(0, {"model_divergence": 0.0})
    assert float(keras.ops.convert_to_numpy(model.eps)) == pytest.approx(0.5)


def test_a_rule_is_what_is_best_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [TASK, Task(**{**vars(TASK), "train_samples": 30})]
    monkeypatch.setattr(study, "TASKS", tasks)
    for task, accuracies in zip(tasks, ((0.8, 0.7), (0.5, 0.7)), strict=True):
        file = study.RunFile(tmp_path / f"{task.name}.csv")
        for eps, accuracy in zip((0.1, 0.3), accuracies, strict=True):
            for seed in study.CHOICE_SEEDS:
                wanted = {"stage": "choice", "arm": study.NRS, "seed": seed}
                wanted |= {"eps": eps, "alpha": 2.0}
                found = {"validation_accuracy": accuracy}
                file.get(wanted, lambda found=found: found)
    assert study.best_on_average(tmp_path, study.NRS) == {"eps": 0.3, "alpha": 2.0}
