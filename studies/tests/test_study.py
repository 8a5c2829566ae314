"""The study: no run is done twice, and its files can be read."""

from pathlib import Path
from typing import Any

import pytest

from keras_nrs.experiments import demo
from studies import study
from studies.arms import ADAPTED
from studies.arms import NRS
from studies.csv_rows import read_rows
from studies.study_tasks import Task
from studies.task_runs import CsvRunStore
from studies.task_runs import TaskRuns
from studies.tests.tiny import TASK

# Nothing here depends on the backend; this one starts soonest.
pytestmark = [pytest.mark.only_torch, pytest.mark.usefixtures("tiny")]


def test_a_task_from_choice_to_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"rule: fixed eps": {"eps": 0.2, "alpha": 1.0}}
    study.run_task(TASK, tmp_path, rules)
    rows = read_rows(tmp_path / "wine-mlp-40.csv")
    tested = [row for row in rows if row["stage"] == "test"]
    names = [demo.BASELINE, NRS, "ball", ADAPTED, "rule: fixed eps"]
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

    monkeypatch.setattr(TaskRuns, "_train", fail)
    study.run_task(TASK, tmp_path, rules)
    assert read_rows(tmp_path / "wine-mlp-40.csv") == rows


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

    monkeypatch.setattr(TaskRuns, "_train", stop_after_five)
    monkeypatch.setattr(TaskRuns, "_flatness", lambda *args: {})
    with pytest.raises(KeyboardInterrupt):
        study.run_task(TASK, tmp_path, {})
    assert len(read_rows(tmp_path / "wine-mlp-40.csv")) == 5
    study.run_task(TASK, tmp_path, {})
    # 2, 2 and 2 settings are compared with 2 seeds each, 4 arms tested with 2.
    assert len(trained) == 3 * 2 * 2 + 4 * 2 + 1
    assert len(read_rows(tmp_path / "wine-mlp-40.csv")) == 3 * 2 * 2 + 4 * 2


def test_a_rule_is_what_is_best_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [TASK, Task(**{**vars(TASK), "train_samples": 30})]
    monkeypatch.setattr(study, "TASKS", tasks)
    for task, accuracies in zip(tasks, ((0.8, 0.7), (0.5, 0.7)), strict=True):
        file = CsvRunStore(tmp_path / f"{task.name}.csv", ("seed", "eps"))
        for eps, accuracy in zip((0.1, 0.3), accuracies, strict=True):
            for seed in range(1000, 1002):
                wanted = {"stage": "choice", "arm": NRS, "seed": seed}
                wanted |= {"eps": eps, "alpha": 2.0}
                found = {"validation_accuracy": accuracy}
                file.get(wanted, lambda found=found: found)
    assert study.best_on_average(tmp_path, NRS) == {"eps": 0.3, "alpha": 2.0}
