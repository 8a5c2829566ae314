"""Hyperparameter searches of recipes, on validation images.

A trial is a recipe with some values changed, trained with each of the recipe's seeds.
Its score is the mean over the seeds of the accuracy on validation images after the last
epoch.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from keras_tuner.engine.trial import Trial
from rich.console import Console
from rich.table import Table

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs._files import DamagedFileError
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text
from keras_nrs._locks import locked
from keras_nrs.experiments.progress import RunProgress
from keras_nrs.experiments.recipes import VALUES_OF_OLD_FILES
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import changes
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.search import OBJECTIVE
from keras_nrs.experiments.search import REMEDY
from keras_nrs.experiments.search import SEARCHES
from keras_nrs.experiments.search import Tuner
from keras_nrs.experiments.search import read_state
from keras_nrs.experiments.search import role
from keras_nrs.experiments.space import Space
from keras_nrs.experiments.space import check_space
from keras_nrs.experiments.space import describe
from keras_nrs.experiments.space import to_hyperparameters
from keras_nrs.experiments.space import to_values
from keras_nrs.experiments.training import Training
from keras_nrs.experiments.training import differences
from keras_nrs.experiments.trials import Result
from keras_nrs.experiments.trials import best_first
from keras_nrs.experiments.trials import to_table
from keras_nrs.experiments.trials import write_csv

_VALIDATION_PERCENT = 10
_TRIALS = 20


class Sweep:
    """A search for the values of a recipe that are best on validation images.

    The folder gets `search.json`, `trials/VALUES/seed-N` (each a folder of `Training`),
    and at the end `trials.csv` and `best.json`. No training in it is run twice. In
    KerasTuner's distributed mode the workers train, and the chief writes files.

    Args:
        recipe_name: Name in `recipes()` of the original recipe.
        recipe: The recipe to train, with other changes. If it holds out no training
            images, the sweep holds out 10 %.
        space: A list of values or a `Range` for each key of the recipe to vary.
        search: `"grid"`, `"random"`, `"bayesian"` or `"hyperband"`.
        trials: Largest number of trials; `None` is 20 for `"random"` and `"bayesian"`,
            all for `"grid"`. A sweep that goes on may have more. Hyperband's number
            follows from the recipe's epochs.
        seed: Seed of the search.
        folder: Output folder. A sweep that was stopped there goes on.
        data_dir: Folder of the prepared data sets; `None` is TFDS's own.

    Raises:
        TypeError, ValueError: if an argument is not as described, the recipe refuses a
            value, or another sweep wrote the folder.

    Example:
        >>> from pathlib import Path
        >>> from keras_nrs.experiments.recipes import recipes
        >>> from keras_nrs.experiments.sweep import Sweep
        >>> name = "digits-wide_resnet_10_1-none-nrs"
        >>> space = {"eps": [0.2, 0.4], "alpha": [1.0, 2.0]}
        >>> sweep = Sweep(name, recipes()[name], space, folder=Path("sweeps") / name)
        >>> sweep.run()  # doctest: +SKIP
        >>> sweep.best.values  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913
        self,
        recipe_name: str,
        recipe: Recipe,
        space: Space,
        *,
        search: str = "grid",
        trials: int | None = None,
        seed: int = 0,
        folder: Path,
        data_dir: str | None = None,
    ) -> None:
        check_choice("recipe_name", recipe_name, recipes())
        self.recipe_name, self.space, self.search = recipe_name, space, search
        self.trials, self.seed = check_search(search, trials, seed), seed
        self.folder, self.data_dir, self._role = folder, data_dir, role()
        self._path = folder / "search.json"
        self._progress: RunProgress | None = None
        percent = recipe.validation_percent or _VALIDATION_PERCENT
        self.recipe = replace(recipe, validation_percent=percent)
        checked = check_space(space, self.recipe, search)
        check_unset(recipe_name, recipe, space)
        for changed in [self.recipe, *checked]:
            # A training checks that the data suit the recipe.
            Training(changed, recipe.seeds[0], folder, data_dir, test=False)
        self._check_folder()

    @property
    def results(self) -> list[Result]:
        """The results of the finished trials: best first, diverged trials last."""
        states = read_state(self._path)["oracle"]["trials"]
        ended = [Trial.from_state(s) for s in states if s["status"] != "RUNNING"]
        try:
            return best_first(map(self._result, ended))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(self._path, error, REMEDY) from error

    @property
    def best(self) -> Result:
        """The result with the highest score.

        Raises:
            ValueError: if no trial has finished, or all diverged.
        """
        results = self.results
        if not results or not results[0].scores:
            raise ValueError(
                f"No trial in {str(self.folder)!r} has a score; {len(results)} "
                "diverged. Use lower learning rates or eps, and another --output."
            )
        return results[0]

    @property
    def is_finished(self) -> bool:
        """Whether the best of this number of trials is written."""
        path = self.folder / "best.json"
        if not path.exists():
            return False
        remedy = "Delete it, and run the sweep again."
        best = read_json(path, _check_best, remedy=remedy)
        return bool(best["trials"] == self.trials)

    @property
    def train_command(self) -> str:
        """The command that trains the best recipe on all images and tests it."""
        # Only the sweep needs held-out images.
        held_out = recipes()[self.recipe_name].validation_percent
        best = replace(self.recipe, **self.best.values, validation_percent=held_out)
        return command("train", self.recipe_name, best, data_dir=self.data_dir)

    def table(self, console: Console) -> Table:
        """The results with their scores, best first, as wide as the console."""
        return to_table(self.recipe_name, self.results, console)

    def number_left(self, trials: int | None) -> int | None:
        """The largest number of trainings that are missing; `None` if none is known.

        Args:
            trials: The largest number of trials, `None` if none is known.
        """
        if trials is None:
            return None
        return max(0, trials - len(self.results)) * len(self.recipe.seeds)

    def run(
        self,
        report: Callable[[str], None] = print,
        progress: RunProgress | None = None,
    ) -> None:
        """Run the trials that are missing.

        Args:
            report: Called with a line of text for each finished trial.
            progress: Shows trainings and epochs.

        Raises:
            RecipeError: if the network cannot have the data's images.
            InUseError: if another process runs the sweep. Workers may be several.
        """
        self._progress = progress
        # Workers and their chief would wait for each other.
        is_over = self._role != "alone" and self.is_finished
        if is_over:
            report(f"{self.recipe_name}: has finished before, in {self.folder}.")
        if self._role == "worker":
            if not is_over:
                self._run(report)
            return
        with locked(self.folder):
            self._check_folder()
            if not is_over:
                self._run(report)
            self._write()

    def _run(self, report: Callable[[str], None]) -> None:
        report(
            f"{self.recipe_name}: trials are compared on "
            f"{self.recipe.validation_percent} % of the training images, which are "
            f"held out; {len(self.results)} have finished in {self.folder} before."
        )
        name = "max_epochs" if self.search == "hyperband" else "max_trials"
        limit = self.recipe.epochs if self.search == "hyperband" else self.trials
        Tuner(
            self.search,
            lambda trial: self._train(trial, report),
            path=self._path,
            request=self._request,
            hyperparameters=to_hyperparameters(self.space),
            # KerasTuner takes 0 for a random seed.
            seed=self.seed + 1,
            **{name: limit},
        ).search()

    def _train(self, trial: Trial, report: Callable[[str], None]) -> dict[str, float]:
        result = self._result(trial)
        recipe = replace(self.recipe, **result.values)
        folder = self.folder / "trials" / result.name
        metrics = {"seconds": 0.0}
        try:
            for seed in recipe.seeds:
                training = Training(
                    recipe, seed, folder / f"seed-{seed}", self.data_dir, test=False
                )
                if self._progress is not None:
                    self._progress.start(f"{result.name}, seed {seed}")
                callbacks = [self._progress] if self._progress is not None else []
                summary = training.run(
                    verbose=0, until=result.epochs, callbacks=callbacks
                )
                metrics[f"seed-{seed}"] = summary["validation_accuracy"]
                metrics["seconds"] += summary["training_seconds"]
        except FloatingPointError as error:
            report(f"{result.name}: diverged. {error}")
            raise
        scores = tuple(metrics[f"seed-{seed}"] for seed in recipe.seeds)
        result = replace(result, scores=scores, seconds=metrics["seconds"])
        report(
            f"{result.name}: validation accuracy {result} after "
            f"{result.epochs} epochs, {result.seconds:.0f} s"
        )
        return metrics | {OBJECTIVE: result.score}

    def _result(self, trial: Trial) -> Result:
        values = to_values(self.space, trial.hyperparameters)
        epochs = replace(self.recipe, **values).epochs
        until = trial.hyperparameters.values.get("tuner/epochs", epochs)
        result = Result(values, until, is_whole=until == epochs)
        if trial.status != "COMPLETED":
            return result
        names = [f"seed-{seed}" for seed in self.recipe.seeds]
        *scores, seconds = map(trial.metrics.get_last_value, [*names, "seconds"])
        return replace(result, scores=tuple(map(float, scores)), seconds=float(seconds))

    @property
    def _request(self) -> dict[str, Any]:
        """Describes the sweep; must be the same in each sweep in the folder."""
        # A grid does not depend on the seed.
        seed = None if self.search == "grid" else self.seed
        request = {"search": self.search, "seed": seed, "space": describe(self.space)}
        return dataclasses.asdict(self.recipe) | request

    def _check_folder(self) -> None:
        found = read_state(self._path)["request"]
        found = found and VALUES_OF_OLD_FILES | found
        different = differences(found, self._request) if found else ""
        if different:
            raise ValueError(
                f"The folder {str(self.folder)!r} belongs to another sweep: "
                f"{different}. Choose another --output."
            )

    def _write(self) -> None:
        results, seeds = self.results, self.recipe.seeds
        write_csv(self.folder / "trials.csv", results, seeds)
        if not any(result.scores for result in results):
            return
        best, names = self.best, [f"seed-{seed}" for seed in seeds]
        content = {
            "recipe": self.recipe_name,
            "values": best.values,
            OBJECTIVE: best.score,
            "scores": dict(zip(names, best.scores, strict=True)),
            "train": self.train_command,
            "search": self.search,
            "space": describe(self.space),
            "seed": self.seed,
            "trials": self.trials,
        }
        write_text(self.folder / "best.json", json.dumps(content, indent=1) + "\n")


def _check_best(content: Any) -> None:
    expect_object(content, trials=(int, type(None)), values=dict)


def check_search(search: str, trials: int | None, seed: int) -> int | None:
    """Check the arguments of a search, and return its largest number of trials."""
    check_choice("search", search, SEARCHES)
    check_seed("seed", seed)
    if search == "hyperband" and trials is not None:
        raise ValueError(
            "`trials` must be None with search='hyperband', whose number of trials "
            f"follows from the recipe's epochs. Received: trials={trials!r}. Leave "
            "--trials out."
        )
    if trials is None and search in ("random", "bayesian"):
        return _TRIALS
    return None if trials is None else check_int("trials", trials, minimum=1)


def check_unset(recipe_name: str, recipe: Recipe, space: Space) -> None:
    """Raise an error for a key that is varied and has a value as well."""
    for key, value in changes(recipe_name, recipe).items():
        if key in space:
            raise ValueError(
                f"{key!r} is varied, and has a value as well. Received: "
                f"{key}={value!r}. Leave the value out, or vary other keys."
            )


def command(name: str, recipe_name: str, recipe: Recipe, **options: Any) -> str:
    """The command `keras-nrs NAME` for a recipe, with options that are not `None`."""
    changed = changes(recipe_name, recipe).items()
    parts = [part for key, value in changed for part in ("--set", f"{key}={value}")]
    for option, value in options.items():
        if value is not None:
            parts += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(["keras-nrs", name, recipe_name, *parts])
