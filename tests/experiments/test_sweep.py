"""Sweeps: their trials, their interruptions, and what they refuse."""

import csv
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow_datasets as tfds
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs.data import ImageData
from keras_nrs.experiments import search
from keras_nrs.experiments import sweep as sweep_module
from keras_nrs.experiments.recipes import NETWORKS
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.space import Range
from keras_nrs.experiments.space import Space
from keras_nrs.experiments.space import parse_space
from keras_nrs.experiments.sweep import Sweep
from keras_nrs.experiments.training import RecipeError
from keras_nrs.experiments.training import Training

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch

NRS = "digits-wide_resnet_10_1-none-nrs"
RPR = "digits-wide_resnet_10_1-none-rpr"
BASELINE = "digits-wide_resnet_10_1-none-baseline"


class FakeTraining:
    """Has an accuracy that its recipe tells; lists what it trained."""

    trained: list[tuple[str, str, int, int]] = []
    accuracy: Callable[[Recipe], float] = staticmethod(lambda recipe: 0.5)

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, data_dir: Any, *, test: bool
    ) -> None:
        assert not test
        self.recipe, self.seed, self.folder = recipe, seed, folder

    def run(self, verbose: int, until: int) -> dict[str, float]:
        path = self.folder / "epochs"
        trained = int(path.read_text()) if path.exists() else 0
        if trained < until:
            name, seed = self.folder.parts[-2:]
            self.trained.append((name, seed, trained, until))
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(str(until))
        accuracy = self.accuracy(self.recipe)
        return {
            "validation_accuracy": accuracy + (self.seed + until) / 1000,
            "training_seconds": 1.0,
        }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """What was trained instead: folder, seed, first and last epoch."""
    monkeypatch.setattr(sweep_module, "Training", FakeTraining)
    monkeypatch.setattr(FakeTraining, "trained", [])
    monkeypatch.setattr(
        FakeTraining,
        "accuracy",
        staticmethod(
            lambda recipe: 0.8 - (recipe.eps - 0.31) ** 2 - (recipe.alpha - 1) ** 2 / 9
        ),
    )
    return FakeTraining.trained


def digits(**changes: Any) -> Recipe:
    return replace(recipes()[NRS], **({"epochs": 9, "seeds": (0, 1)} | changes))


SEARCHES: dict[str, tuple[Space, dict[str, Any]]] = {
    "grid": ({"eps": [0.1, 0.3, 0.5], "alpha": [1.0, 2.0]}, {}),
    "random": ({"eps": Range(0.05, 0.5), "alpha": [1, 2]}, {"trials": 4}),
    "bayesian": ({"eps": Range(0.01, 0.5, log=True)}, {"trials": 5}),
    "hyperband": ({"eps": Range(0.05, 0.5), "interval": Range(1, 4)}, {}),
}


def make(name: str, folder: Path) -> Sweep:
    space, options = SEARCHES[name]
    return Sweep(NRS, digits(), space, search=name, folder=folder, **options)


def trials_in_order(folder: Path) -> list[Any]:
    """Values of all trials, and how they ended."""
    trials = search.read_state(folder / "search.json")["oracle"]["trials"]
    return [(t["hyperparameters"]["values"], t["status"], t["score"]) for t in trials]


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Stops the program at the n-th write of the state, before or after it."""
    write_text = search.write_text

    def set_kill(write: int, before: bool) -> None:
        writes = iter(range(1, 1000))

        def write_and_die(*args: Any) -> None:
            is_last = next(writes) == write
            if is_last and before:
                raise Killed
            write_text(*args)
            if is_last:
                raise Killed

        monkeypatch.setattr(search, "write_text", write_and_die)

    return set_kill


def run_with_kills(
    name: str, folder: Path, kill_at: Callable[[int, bool], None]
) -> int:
    """Each process makes one write, and dies just after it or before the next one."""
    for kills in range(1000):
        kill_at(1 + kills % 2, kills % 2 == 1)
        try:
            make(name, folder).run(lambda line: None)
        except Killed:
            continue
        return kills
    raise AssertionError


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_killed_at_every_write_is_the_undisturbed_one(
    tmp_path: Path, trained: list[Any], kill_at: Any, name: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_at(0, False)
    make(name, whole).run(lambda line: None)
    undisturbed = trained.copy()
    trained.clear()
    kills = run_with_kills(name, killed, kill_at)
    assert trials_in_order(killed) == trials_in_order(whole)
    assert trained == undisturbed
    assert kills >= 2 * len(trials_in_order(whole)) - 1
    for file in ("trials.csv", "best.json"):
        assert (killed / file).read_text() == (whole / file).read_text()


# The Bayesian search takes seconds for a trial.
@pytest.mark.parametrize("name", ["grid", "random", "hyperband"])
def test_a_search_killed_once_is_the_undisturbed_one(
    tmp_path: Path, trained: list[Any], kill_at: Any, name: str
) -> None:
    kill_at(0, False)
    make(name, tmp_path / "whole").run(lambda line: None)
    undisturbed = trained.copy()
    expected = trials_in_order(tmp_path / "whole")
    for write in range(1, 2 * len(expected) + 1, 1 if name == "grid" else 5):
        for before in (True, False):
            trained.clear()
            folder = tmp_path / f"{write}-{before}"
            kill_at(write, before)
            with pytest.raises(Killed):
                make(name, folder).run(lambda line: None)
            make(name, folder).run(lambda line: None)
            assert trials_in_order(folder) == expected
            assert trained == undisturbed


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
    # On all training images, as the recipe says.
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

    monkeypatch.setattr(FakeTraining, "accuracy", staticmethod(accuracy))
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
        patched.setattr(FakeTraining, "accuracy", staticmethod(fail))
        result = invoke(NRS, "--vary", "eps=0.1,0.2", "--output", str(tmp_path))
    if isinstance(error, RecipeError):
        assert result.exit_code == 2
        assert "too small" in result.output
    else:
        assert result.exception is error
    assert len(trained) == 1
    result = invoke(NRS, "--vary", "eps=0.1,0.2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert len(trained) == 6


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["sweep", *arguments])


def test_the_papers_sweeps_share_the_baselines(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(recipe: Recipe) -> float:
        if recipe.scheme == "baseline":
            return 0.5 + recipe.learning_rate + recipe.weight_decay
        assert (recipe.learning_rate, recipe.weight_decay) == (0.2, 1e-3)
        return 0.8 - abs(recipe.eps - 0.1) - recipe.alpha / 10

    monkeypatch.setattr(FakeTraining, "accuracy", staticmethod(accuracy))
    settings = ["--set", "seeds=3", "--set", "perturbation=ball"]
    options = [*settings, "--output", str(tmp_path)]
    result = invoke(NRS, *options)
    assert result.exit_code == 0, result.output
    assert len(trained) == 16 + 9
    best = json.loads((tmp_path / NRS / "best.json").read_text())
    assert best["values"] == {"eps": 0.1, "alpha": 0.5}
    command = best["train"]
    assert command in result.output
    for setting in ("learning_rate=0.2", "weight_decay=0.001", "batch_size=128"):
        assert f"--set {setting} " in command
    assert "validation_percent" not in command
    # The command is that of the recipe.
    parsed = [part for part in shlex.split(command) if "=" in part]
    assert {"seeds=(3,)", "perturbation=ball", "eps=0.1", "alpha=0.5"} < set(parsed)
    result = invoke(RPR, "--output", str(tmp_path), "--set", "seeds=3")
    assert result.exit_code == 0, result.output
    assert len(trained) == 16 + 9 + 3
    # In several processes it must be there, and is.
    distributed = {"IP": "127.0.0.1", "PORT": "1"}
    for name, value in distributed.items():
        monkeypatch.setenv(f"KERASTUNER_ORACLE_{name}", value)
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker")
    result = invoke(NRS, "--output", str(tmp_path / "new"), "--set", "seeds=3")
    assert result.exit_code == 2
    first = f"keras-nrs sweep {BASELINE} --set 'seeds=(3,)' --output {tmp_path}/new"
    # Long lines are broken anywhere.
    assert "".join(first.split()) in "".join(result.output.split())


@pytest.mark.parametrize("vary", [[], ["--vary", "eps=0.1,0.2"]])
def test_distributed_mode_needs_all_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vary: list[str]
) -> None:
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    result = invoke(NRS, *vary, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "Set KERASTUNER_ORACLE_PORT and KERASTUNER_TUNER_ID" in " ".join(
        result.output.split()
    )


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
    ("name", "message"),
    [
        ("cifar10-resnet-basic-nrs", "No recipe has the name"),
        ("cifar10-vit_s-basic-baseline", "varies none. Say what to vary: --vary"),
        ("imagenet2012-imagenet_vgg16-flip-baseline", "--vary KEY=V1,V2"),
    ],
)
def test_recipes_without_a_sweep(tmp_path: Path, name: str, message: str) -> None:
    result = invoke(name, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_vits_have_no_baseline_first(tmp_path: Path, trained: list[Any]) -> None:
    result = invoke("cifar10-vit_s-basic-rpr", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert len(trained) == 3 * 3


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


def test_parse_space() -> None:
    entries = ["perturbation=ball,relative", "eps=0.01:1:log", "batch_size=8:64"]
    assert parse_space(entries) == {
        "perturbation": ["ball", "relative"],
        "eps": Range(0.01, 1, log=True),
        "batch_size": Range(8, 64),
    }


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
from keras_nrs.experiments import recipes, search, training

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

counts, deadly = collections.Counter(), sys.argv.pop(1)
recipes.NETWORKS["small"] = small
search.write_text, training.write_text = write_state, write_summary
training._SaveEpoch.on_train_batch_end = lambda *args, **kwargs: event("batch")
cli.main()
"""


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One device is enough, and sooner compiled for.
        env=os.environ | {"XLA_FLAGS": ""} | environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=900)
    return process.returncode, output + errors


@pytest.mark.parametrize(
    "deaths",
    [
        # In the second trial, after it, and before the third is known.
        ("batch:7",),
        pytest.param(("batch:7", "summary:1", "state:2"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_has_the_undisturbed_result(
    tmp_path: Path, deaths: tuple[str, ...]
) -> None:
    data_dir = str(tmp_path / "data")
    tfds.load("digits", data_dir=data_dir)

    def sweep(deadly: str, output: Path) -> subprocess.Popen[str]:
        settings = ("network=small", "seeds=0", "epochs=2", "steps_per_epoch=2")
        arguments = [part for setting in settings for part in ("--set", setting)]
        arguments += ["--vary", "eps=0.2,0.4,0.6"]
        paths = ["--output", str(output), "--data-dir", data_dir]
        return start(SCRIPT, deadly, "sweep", NRS, *arguments, *paths)

    whole = sweep("never", tmp_path / "whole")
    for deadly in deaths:
        code, output = finish(sweep(deadly, tmp_path / "killed"))
        assert code == -signal.SIGKILL, output
    code, output = finish(sweep("never", tmp_path / "killed"))
    assert code == 0, output
    assert f"{(len(deaths) + 1) // 2} have finished" in output
    assert finish(whole)[0] == 0
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


# A chief or a worker, whose trainings wait until there are two workers.
WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from keras_tuner.src.distribute import oracle_chief
from keras_nrs import cli
from keras_nrs.experiments import sweep

folder = Path(sys.argv.pop(1))
me = os.environ["KERASTUNER_TUNER_ID"]

class Training:
    def __init__(self, recipe, seed, path, data_dir, test):
        self.recipe, self.name = recipe, path.parent.name

    def run(self, verbose, until):
        with (folder / f"{me}.log").open("a") as file:
            file.write(self.name + "\\n")
        while len(list(folder.glob("*.log"))) < 2:
            time.sleep(0.05)
        return {"validation_accuracy": self.recipe.eps, "training_seconds": 0}

sweep.Training = Training
# It waits for 20 seconds after the first worker has left.
oracle_chief.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.2))
cli.main()
"""


def test_two_workers_share_a_search(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        start(
            WORKER,
            str(tmp_path),
            *["sweep", NRS, "--set", "seeds=0", "--output", str(tmp_path / "out")],
            *["--vary", "eps=0.1,0.2,0.3", "--vary", "alpha=1,2"],
            KERASTUNER_ORACLE_IP="127.0.0.1",
            KERASTUNER_ORACLE_PORT=str(port),
            KERASTUNER_TUNER_ID=name,
        )
        for name in ("chief", "one", "two")
    ]
    outputs = [finish(process) for process in processes]
    assert [code for code, _ in outputs] == [0, 0, 0], outputs
    done = [(tmp_path / f"{name}.log").read_text().split() for name in ("one", "two")]
    assert all(done)
    grid = [f"eps={eps},alpha={alpha}" for eps in (0.1, 0.2, 0.3) for alpha in (1, 2)]
    assert sorted(done[0] + done[1]) == grid
    chief, *workers = [output for _, output in outputs]
    assert "Best: eps=0.3" in chief
    assert not any("Best" in output for output in workers)
    assert sum(output.count("validation accuracy 0.") for output in workers) == 6
    best = json.loads((tmp_path / "out" / NRS / "best.json").read_text())
    assert best["validation_accuracy"] == 0.3


def test_no_test_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ImageData) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageData, "test", fail)
    monkeypatch.setitem(NETWORKS, "linear", linear)
    recipe = digits(network="linear", epochs=2, steps_per_epoch=2, seeds=(0,))
    sweep = Sweep(NRS, recipe, {"eps": [0.1]}, folder=tmp_path)
    sweep.run(lambda line: None)
    folder = tmp_path / "trials" / "eps=0.1" / "seed-0"
    assert sweep.best.scores == (accuracy(folder, "validation"),)
    with pytest.raises(ValueError, match="test=False there, None here"):
        Training(sweep.recipe, 0, folder)


def linear(shape: tuple[int, ...], classes: int) -> keras.Model:
    layers = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(classes)]
    return keras.Sequential(layers)


def accuracy(folder: Path, split: str) -> float:
    summary = json.loads((folder / "summary.json").read_text())
    return float(summary[f"{split}_accuracy"])
