"""Sweeps whose trainings are made up."""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs.experiments import search
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.space import Range
from keras_nrs.experiments.space import Space
from keras_nrs.experiments.sweep import Sweep
from tests.experiments.runs import NRS


class FakeTraining:
    """A training whose accuracy is a function of its recipe; lists all trainings."""

    trained: list[tuple[str, str, int, int]] = []
    accuracy: Callable[[Recipe], float] = staticmethod(lambda recipe: 0.5)

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, data_dir: Any, *, test: bool
    ) -> None:
        assert not test
        self.recipe, self.seed, self.folder = recipe, seed, folder

    def run(
        self, verbose: int, until: int, callbacks: Sequence[Any] = ()
    ) -> dict[str, float]:
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


def set_accuracy(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[Recipe], float]
) -> None:
    """Let the made-up trainings have an accuracy of the recipe."""
    monkeypatch.setattr(FakeTraining, "accuracy", staticmethod(accuracy))


def digits(**changes: Any) -> Recipe:
    return replace(recipes()[NRS], **({"epochs": 9, "seeds": (0, 1)} | changes))


SEARCHES: dict[str, tuple[Space, dict[str, Any]]] = {
    "grid": ({"eps": [0.1, 0.3, 0.5], "alpha": [1.0, 2.0]}, {}),
    "random": ({"eps": Range(0.05, 0.5), "alpha": [1, 2]}, {"trials": 4}),
    "bayesian": ({"eps": Range(0.01, 0.5, log=True)}, {"trials": 5}),
    "hyperband": ({"eps": Range(0.05, 0.5), "interval": Range(1, 4)}, {}),
}


def make(name: str, folder: Path) -> Sweep:
    """A sweep with one of `SEARCHES`."""
    space, options = SEARCHES[name]
    return Sweep(NRS, digits(), space, search=name, folder=folder, **options)


def trials_in_order(folder: Path) -> list[Any]:
    """The values of all trials, and how they ended."""
    trials = search.read_state(folder / "search.json")["oracle"]["trials"]
    return [(t["hyperparameters"]["values"], t["status"], t["score"]) for t in trials]


def invoke(*arguments: str) -> Any:
    """The result of the command `keras-nrs sweep`."""
    return CliRunner().invoke(cli.build_app(), ["sweep", *arguments])
