"""Sweeps: their trials, their interruptions, and the arguments that they refuse."""

import csv
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from keras_nrs import cli
from keras_nrs.data import ImageData
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_settings
from keras_nrs.experiments.sweep import Sweep
from keras_nrs.experiments.sweep import command
from keras_nrs.experiments.training import RecipeError
from keras_nrs.experiments.training import Training
from tests.experiments.processes import Script
from tests.experiments.runs import NRS
from tests.experiments.sweeps import SEARCHES
from tests.experiments.sweeps import digits
from tests.experiments.sweeps import invoke
from tests.experiments.sweeps import make
from tests.experiments.sweeps import set_accuracy
from tests.experiments.sweeps import trials_in_order

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_grid_has_all_values_and_the_best_is_the_mean_of_the_seeds(
    tmp_path: Path, trained: list[Any]
) -> None:
    lines: list[str] = []
    sweep = make("grid", tmp_path)
    assert not sweep.is_finished
    with pytest.raises(ValueError, match="has a score"):
        _ = sweep.best
    sweep.run(lines.append)
    names = [f"eps={e},alpha={a}" for e in (0.1, 0.3, 0.5) for a in (1.0, 2.0)]
    assert trained == [(n, f"seed-{s}", 0, 9) for n in names for s in (0, 1)]
    assert "compared on 10 % of the training images" in lines[0]
    assert lines[3] == (
        "eps=0.3,alpha=1.0: validation accuracy 0.8094 ± 0.0007 after 9 epochs, 2 s"
    )
    assert sweep.is_finished
    assert sweep.best.values == {"eps": 0.3, "alpha": 1.0}
    assert sweep.best.score == pytest.approx(0.8094)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["scores"] == pytest.approx({"seed-0": 0.8089, "seed-1": 0.8099})
    assert best["space"] == {"eps": "0.1,0.3,0.5", "alpha": "1.0,2.0"}
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["eps"] for row in rows[:3]] == ["0.3", "0.5", "0.1"]
    assert len(rows) == 6
    # The best is trained on all training images, as the recipe says.
    settings = "--set epochs=9 --set eps=0.3 --set 'seeds=(0, 1)'"
    assert sweep.train_command == f"keras-nrs train {NRS} {settings}"


def test_values_come_back_as_they_were(tmp_path: Path, trained: list[Any]) -> None:
    space = {"clip_norm": [None, 5, 0.5], "normalize": [True, False]}
    sweep = Sweep(NRS, digits(), space, folder=tmp_path)
    sweep.run(lambda line: None)
    found = [tuple(result.values.values()) for result in sweep.results]
    assert sorted(map(str, found)) == sorted(
        str((norm, flag)) for norm in (None, 5, 0.5) for flag in (True, False)
    )


def test_the_command_of_a_source_makes_the_same_recipe(tmp_path: Path) -> None:
    name = "cifar10-vgg16-basic-nrs"
    for settings in (
        ["source=paper"],
        ["source=paper", "clip_norm=2.0"],
        ["source=paper", "clip_norm=2.0", "perturbation=released", "eps=0.3"],
        ["clip_norm=5"],
    ):
        recipe = with_settings(recipes()[name], settings)
        parts = shlex.split(command("train", name, recipe))
        given = [part for part in parts if "=" in part]
        assert sorted(given) == sorted(settings)
        assert with_settings(recipes()[name], given) == recipe


def test_a_sweep_of_version_0_1_0_goes_on(tmp_path: Path, trained: list[Any]) -> None:
    make("grid", tmp_path).run(lambda line: None)
    path = tmp_path / "search.json"
    state = json.loads(path.read_text())
    assert state["request"].pop("source") == "paper"
    path.write_text(json.dumps(state))
    count = len(trained)
    make("grid", tmp_path).run(lambda line: None)
    assert len(trained) == count


def test_epochs_are_varied_like_others(tmp_path: Path, trained: list[Any]) -> None:
    space = {"epochs": [5, 9], "eps": [0.3, 0.5]}
    sweep = Sweep(NRS, digits(epochs=20), space, folder=tmp_path)
    sweep.run(lambda line: None)
    assert [tuple(result.values.values()) for result in sweep.results] == [
        (9, 0.3),
        (5, 0.3),
        (9, 0.5),
        (5, 0.5),
    ]
    assert {last for *_, last in trained} == {5, 9}


def test_hyperband_trains_no_epoch_twice_and_prefers_whole_trainings(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make("hyperband", tmp_path)
    sweep.run(lambda line: None)
    reached: dict[tuple[str, str], int] = {}
    for name, seed, first, last in trained:
        assert reached.get((name, seed), 0) == first
        reached[name, seed] = last
    assert {last for *_, last in trained} == {1, 3, 9}
    assert sweep.best.epochs == 9
    assert len(sweep.results) == len(reached) / 2
    assert all(0.05 <= result.values["eps"] <= 0.5 for result in sweep.results)
    assert all(type(result.values["interval"]) is int for result in sweep.results)


def test_more_trials_go_on(tmp_path: Path, trained: list[Any]) -> None:
    def run(trials: int | None) -> None:
        Sweep(NRS, digits(), SEARCHES["grid"][0], trials=trials, folder=tmp_path).run(
            lambda line: None
        )

    run(2)
    assert len(trained) == 4
    run(4)
    assert len(trained) == 8
    run(None)
    assert len(trained) == len(set(trained)) == 12


def test_a_trial_that_diverges_is_last_and_the_search_goes_on(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(recipe: Recipe) -> float:
        if recipe.eps > 0.05:
            raise FloatingPointError("The loss is nan.")
        return 0.5

    set_accuracy(monkeypatch, accuracy)
    values = ["--vary", "eps=0.5,0.4,0.3,0.2,0.01", "--output", str(tmp_path)]
    result = invoke(NRS, *values)
    assert result.exit_code == 0, result.output
    assert "eps=0.5: diverged. The loss is nan." in result.output
    assert result.output.count("diverged") == 8
    assert "Best: eps=0.01" in result.output
    again = invoke(NRS, *values)
    assert "5 have finished" in again.output
    assert len(trained) == 4 + 3
    nothing = invoke(NRS, "--vary", "eps=0.5,0.4", "--output", str(tmp_path / "other"))
    assert nothing.exit_code == 1
    assert "2 diverged. Use lower" in " ".join(nothing.output.split())


@pytest.mark.parametrize("error", [RecipeError("too small"), OSError("disk full")])
def test_other_errors_stop_the_search(
    tmp_path: Path,
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(recipe: Recipe) -> float:
        raise error

    with monkeypatch.context() as patched:
        set_accuracy(patched, fail)
        result = invoke(NRS, "--vary", "eps=0.1,0.2", "--output", str(tmp_path))
    if isinstance(error, RecipeError):
        assert result.exit_code == 2
        assert "too small" in result.output
    else:
        assert result.exit_code == 1
        assert result.stderr == "Error: disk full\n"
    assert len(trained) == 1
    result = invoke(NRS, "--vary", "eps=0.1,0.2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert len(trained) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "eps=-1,1"], "`eps` must be finite and >= 0. Received: eps=-1"),
        (["--vary", "epz=1"], "Similar keys: eps"),
        (["--vary", "eps"], "A setting must be key=value"),
        (["--vary", "network=resnet"], "`network` must be one of"),
        (["--vary", "augmentation=none,best"], "`augmentation` must be one of"),
        (["--vary", "batch_size=50,5000"], "Received: batch_size=5000"),
        (["--vary", "seeds=1,2"], "'seeds' cannot be varied"),
        (["--vary", "validation_percent=5,10"], "'validation_percent' cannot be"),
        (["--vary", "eps=0.1,0.10"], "listed twice. Received: 'eps=0.1,0.1'"),
        (["--vary", "eps=1", "--vary", "eps=2"], "'eps' is varied twice"),
        (["--vary", "eps=0.1", "--set", "eps=0.2"], "has a value as well"),
        (["--set", "learning_rate=0.2"], "'learning_rate' is varied, and has a value"),
        (["--set", "eps=0.2", "--set", "optimizer=adam"], "'eps' is varied, and has"),
        (["--vary", "eps=0:1"], "'eps=0:1'. Use --search random"),
        (["--vary", "eps=1:0", "--search", "random"], "Received: 'eps=1:0'"),
        (["--vary", "eps=0:1:log", "--search", "random"], "above 0 with 'log'"),
        (["--vary", "eps=0:1:exp", "--search", "random"], "LOW:HIGH:log"),
        (["--vary", "batch_size=8:9.5", "--search", "random"], "batch_size=9.5"),
        (["--vary", "scheme=a:b", "--search", "random"], "with two numbers"),
        (["--vary", "normalize=0:1", "--search", "random"], "Only numbers"),
        (["--vary", "eps=0:1", "--search", "best"], "`search` must be one of"),
        (["--vary", "eps=0.1", "--trials", "0"], "`trials` must be an integer >= 1"),
        (["--vary", "eps=0.1", "--seed", "-1"], "`seed` must be an integer"),
        (["--trials", "0"], "`trials` must be an integer >= 1"),
        (["--vary", "eps=0:1", "--search", "hyperband", "--trials", "3"], "Leave"),
        (["--vary", "eps=1,2", "--search", "hyperband"], "range of real numbers"),
        (["--vary", "epochs=2:9", "--search", "hyperband"], "'epochs' cannot be"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(NRS, *arguments, "--output", str(tmp_path))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--vary", "eps=0.1,0.3"], "space={'eps': '0.1,0.2'} there"),
        (
            ["--vary", "eps=0.1,0.2", "--search", "random"],
            "'grid' there, 'random' here",
        ),
        (["--vary", "eps=0.1,0.2", "--set", "alpha=2"], "alpha=1.0 there, 2 here"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(
    tmp_path: Path, trained: list[Any], change: list[str], message: str
) -> None:
    output = ["--output", str(tmp_path)]
    assert invoke(NRS, "--vary", "eps=0.1,0.2", *output).exit_code == 0
    # A grid's order needs no seed.
    same = invoke(NRS, "--vary", "eps=0.1,0.2", "--seed", "7", *output)
    assert same.exit_code == 0, same.output
    result = invoke(NRS, *change, *output)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert len(trained) == 6


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("keras_nrs.experiments.s")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(f"{name}", raising=False)
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    monkeypatch.setattr(sys, "argv", ["keras-nrs", "sweep", NRS])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert "needs the package keras_tuner" in str(exit_info.value)
    assert 'pip install "keras-nrs[experiments]"' in str(exit_info.value)


# The command with a small network. It kills itself at an event, such as the second
# time that it is about to write the state.
SCRIPT = """
import collections, os, signal, sys, keras
from keras import layers
from keras_nrs import cli
from keras_nrs.experiments import recipes, search, sweep, training

def small(shape, classes):
    stack = [keras.Input(shape), layers.Flatten(), layers.Dropout(0.3)]
    return keras.Sequential([*stack, layers.Dense(classes)])

def event(kind):
    counts[kind] += 1
    if f"{kind}:{counts[kind]}" == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def write_state(*args, write_text=search.write_text):
    event("state")
    write_text(*args)

def write_summary(path, text, write_text=training.write_text):
    write_text(path, text)
    if path.name == "summary.json":
        event("summary")

counts, deadly = collections.Counter(), None
recipes.NETWORKS["small"] = small
search.write_text, training.write_text = write_state, write_summary
training._SaveEpoch.on_train_batch_end = lambda *args, **kwargs: event("batch")

def main(event, *arguments):
    global deadly
    deadly = event
    sys.argv[1:] = arguments
    cli.main()
"""


@pytest.mark.slow
def test_a_command_killed_three_times_has_the_undisturbed_result(
    tmp_path: Path, data_dir: str
) -> None:
    settings = ("network=small", "seeds=0", "epochs=2", "steps_per_epoch=2")
    arguments = ["sweep", NRS, "--vary", "eps=0.2,0.4,0.6", "--data-dir", data_dir]
    arguments += [part for setting in settings for part in ("--set", setting)]
    with Script(SCRIPT, tmp_path) as script:

        def sweep(deadly: str, folder: str) -> tuple[int, str]:
            output = str(tmp_path / folder)
            return script.run(deadly, *arguments, "--output", output)

        assert sweep("never", "whole")[0] == 0
        # In the second trial, after it, and before the third is known.
        for deadly in ("batch:7", "summary:1", "state:2"):
            code, output = sweep(deadly, "killed")
            assert code == -signal.SIGKILL, output
        code, output = sweep("never", "killed")
    assert code == 0, output
    assert "2 have finished" in output
    folders = [tmp_path / name / NRS for name in ("whole", "killed")]
    assert trials_in_order(folders[1]) == trials_in_order(folders[0])
    best = [json.loads((folder / "best.json").read_text()) for folder in folders]
    assert best[0] == best[1]
    assert best[0]["train"] in output.replace("\n", " ")
    trials = folders[1] / "trials"
    sessions = {
        folder.name: len(json.loads((folder / "seed-0/environment.json").read_text()))
        for folder in trials.iterdir()
    }
    assert sessions == {"eps=0.2": 1, "eps=0.4": 2, "eps=0.6": 1}
    summary = json.loads((trials / "eps=0.6/seed-0/summary.json").read_text())
    assert "validation_accuracy" in summary
    assert not [name for name in summary if "test" in name or "eigenvalue" in name]


def test_seventeen_keys_make_no_name_too_long(
    tmp_path: Path, trained: list[Any]
) -> None:
    values = {
        "network": "wide_resnet_28_10",
        "augmentation": "flip",
        "dtype_policy": "mixed_bfloat16",
        "perturbation": "layerwise",
        "optimizer": "adam",
        "scheme": "nrs",
        "normalize": True,
        **dict.fromkeys(
            ("learning_rate", "weight_decay", "label_smoothing"), 0.0123456
        ),
        **dict.fromkeys(("eps", "alpha", "clip_norm"), 0.12345678),
        **dict.fromkeys(("epochs", "steps_per_epoch", "interval"), 3),
        "batch_size": 100,
    }
    assert len(values) == 17
    vary = [part for k, v in values.items() for part in ("--vary", f"{k}={v}")]
    arguments = [NRS, *vary, "--set", "seeds=0", "--output", str(tmp_path)]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    ((name, *_),) = trained
    assert len(name) == 255
    assert (tmp_path / NRS / "trials" / name / "seed-0").is_dir()
    assert (
        invoke(NRS, *vary, "--set", "seeds=0", "--output", str(tmp_path)).exit_code == 0
    )
    assert len(trained) == 1


def test_no_test_image_is_read(
    tmp_path: Path, data_dir: str, linear: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ImageData) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageData, "test", fail)
    recipe = digits(network=linear, epochs=2, steps_per_epoch=2, seeds=(0,))
    space = {"eps": [0.1]}
    sweep = Sweep(NRS, recipe, space, folder=tmp_path, data_dir=data_dir)
    sweep.run(lambda line: None)
    folder = tmp_path / "trials" / "eps=0.1" / "seed-0"
    summary = json.loads((folder / "summary.json").read_text())
    assert sweep.best.scores == (summary["validation_accuracy"],)
    with pytest.raises(ValueError, match="test=False there, None here"):
        Training(sweep.recipe, 0, folder)
