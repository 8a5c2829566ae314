"""`tune()`, from data to a decision."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.tuning.race import FIRST_CHOOSING_SEED
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.task import Task
from tests.support.data import image_data
from tests.tuning.made_up import row
from tests.tuning.test_task import classifier

X, Y = image_data(40)
ARGUMENTS: dict[str, Any] = {
    "validation_data": (X[:20], Y[:20]),
    "fit": {"epochs": 2, "batch_size": 10},
    "seeds": 2,
    "verbose": 0,
}


def tune(make_model: Any = classifier, **changes: Any) -> keras_nrs.TuneResult:
    return keras_nrs.tune(make_model, X[20:], Y[20:], **(ARGUMENTS | changes))


@pytest.mark.matrix
def test_a_call_from_data_to_a_decision(tmp_path: Path) -> None:
    sphere = keras_nrs.perturbations.RelativeBall(radius="sphere")
    too_large = {"scheme": "rpr", "eps": 3e38, "perturbation": sphere}
    settings = {"RPR": {"scheme": "rpr"}, "too large": too_large}
    result = tune(settings=settings, folder=tmp_path)
    names = ["baseline", *settings]
    assert [line["setting"] for line in result.table] == names
    assert [run["setting"] for run in result.runs] == 2 * names
    assert [line["cost"] for line in result.table] == [1, 1, 1]
    failures = {line["setting"]: line["failed"] for line in result.table}
    assert failures == dict.fromkeys(names, 0) | {"too large": 2}
    assert result.metric == "accuracy" and result.not_run == []
    # The best model is the one that was measured, and is in the folder.
    of_best = [run for run in result.runs if run["setting"] == result.best]
    best = max(of_best, key=lambda run: run["measured"]["accuracy"])
    for model in (
        result.best_model,
        keras.models.load_model(tmp_path / "best.keras"),
    ):
        logs = model.evaluate(X[:20], Y[:20], return_dict=True, verbose=0)
        for name, value in logs.items():
            assert value == pytest.approx(best["measured"][name], rel=1e-5)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["decision"] == result.decision
    assert written["table"][0]["difference"] is None
    assert "0 of 2" in str(result) and str(result).endswith(result.decision)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trainings that only their names and seeds decide; lists them."""
    done: list[tuple[str, int]] = []

    def train(task: Task, setting: Setting, seed: int) -> Any:
        done.append((setting.name, seed))
        gain = 0.2 if setting.name == "NRS, eps 0.4" else 0.0
        model = task.built_model(1)
        model.set_weights([np.full_like(w, seed) for w in model.get_weights()])
        return row(0.5 + gain + 0.01 * (seed % 7), setting), model

    monkeypatch.setattr(Task, "train", train)
    return done


@pytest.mark.only_torch
def test_the_best_setting_and_its_model(
    trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    # With equal differences of all seeds there is no interval.
    noisy = iter(np.random.default_rng(0).normal(0, 0.002, 100))
    unchanged = Task.train

    def train(task: Task, setting: Setting, seed: int) -> Any:
        found, model = unchanged(task, setting, seed)
        found["measured"]["accuracy"] += next(noisy)
        return found, model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "train", train)
        result = tune(seeds=5, verbose=1)
    assert (result.best, result.best_epochs) == ("NRS, eps 0.4", 2)
    assert result.best_arguments == {"eps": 0.4}
    assert result.decision.startswith("Train keras_nrs.wrap(model, eps=0.4): accuracy")
    # Weights of the best of the judging seeds.
    assert np.unique(result.best_model.get_weights()[0]) == [4]
    assert result.best_model.compiled
    judged = [line["setting"] for line in result.table if line["is_judged"]]
    assert len(judged) == 4 and "NRS, eps 0.4" in judged
    output = capsys.readouterr().out
    assert output.count("s; about ") == len(trained) == 10 + 6 + 5 * 4
    assert output.startswith(
        f"choosing seed {FIRST_CHOOSING_SEED}, baseline: accuracy (%) "
    )
    assert str(result) in output
    assert " (1) " in str(result)


@pytest.mark.only_torch
def test_a_stopped_call_goes_on(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(folder=tmp_path / "whole")
    num, unchanged = len(trained), Task.train

    def train(task: Task, setting: Setting, seed: int) -> Any:
        if len(trained) == num + 7:
            raise KeyboardInterrupt
        return unchanged(task, setting, seed)

    monkeypatch.setattr(Task, "train", train)
    with pytest.raises(KeyboardInterrupt):
        tune(folder=tmp_path / "stopped")
    monkeypatch.setattr(Task, "train", unchanged)
    result = tune(folder=tmp_path / "stopped")
    assert trained[num:] == trained[:num]
    assert (result.decision, result.table) == (whole.decision, whole.table)
    # The same call again, and one with more seeds.
    assert tune(folder=tmp_path / "stopped").runs == result.runs
    assert len(trained) == 2 * num
    tune(folder=tmp_path / "stopped", seeds=3)
    assert len(trained) == 2 * num + 4


@pytest.mark.only_torch
def test_a_folder_of_another_call(tmp_path: Path, trained: list[Any]) -> None:
    tune(folder=tmp_path, settings={"NRS": {}})
    num = len(trained)
    with pytest.raises(ValueError, match="whose fit differ"):
        tune(folder=tmp_path, fit={"epochs": 3})
    with pytest.raises(ValueError, match="whose validation data differ"):
        tune(folder=tmp_path, validation_data=(X[:19], Y[:19]))
    assert len(trained) == num
    tune(folder=tmp_path, settings={"other name": {}, "more": {"eps": 0.3}})
    assert len(trained) == num + 2


@pytest.mark.only_torch
def test_a_budget_says_what_was_not_run(trained: list[Any]) -> None:
    result = tune(max_epochs=2 * 24)
    assert "NRS, eps 0.6, alpha 4" in result.not_run and "SAM" in result.not_run
    assert "Not run, for the budget: " in str(result)
    tiny = tune(max_epochs=1)
    assert tiny.best == "baseline" and "budget did not suffice" in tiny.decision


@pytest.mark.only_torch
def test_a_schedule_without_epochs_is_warned_of(trained: list[Any]) -> None:
    def make_model() -> keras.Model:
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 4)
        return classifier(optimizer=keras.optimizers.SGD(schedule))

    with pytest.warns(UserWarning, match="Give `make_model` a parameter `epochs`"):
        tune(make_model, settings={"NRS": {}})
    tune(make_model, settings={"RPR": {"scheme": "rpr"}})


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "`seeds` must be an integer from 2"),
        ({"minutes": 0}, "`minutes` must be > 0"),
        ({"max_epochs": -1}, "`max_epochs` must be finite and >= 0"),
        ({"verbose": 2}, "`verbose` must be an integer from 0 to 1"),
        ({"metric": "auc"}, "`metric` must be 'auto' or one of"),
        ({"settings": {"a": {"eps": -1}}}, "`eps` must be finite and >= 0"),
        ({"fit": {"epochs": 1, "lr": 3}}, "`fit` must have keys among"),
        ({"validation_data": None}, "`validation_data` must be given"),
    ],
)
def test_bad_arguments(changes: Any, message: str, trained: list[Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tune(**changes)
    assert not trained
