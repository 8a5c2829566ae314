"""The paper's searches: the baseline's first, then those that build on it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import changes
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_values
from keras_nrs.experiments.search import role
from keras_nrs.experiments.space import Space
from keras_nrs.experiments.space import check_space
from keras_nrs.experiments.sweep import Sweep
from keras_nrs.experiments.sweep import check_search
from keras_nrs.experiments.sweep import check_unset
from keras_nrs.experiments.sweep import command

PAPER_SPACES: dict[str, Space] = {
    "baseline": {
        "learning_rate": [0.01, 0.05, 0.1, 0.2],
        "weight_decay": [5e-4, 1e-3],
        "batch_size": [128, 256],
    },
    "rpr": {"eps": [0.05, 0.1, 0.5]},
    "nrs": {"eps": [0.05, 0.1, 0.5], "alpha": [0.5, 1.0, 2.0]},
}
# A baseline does not depend on these keys.
_PERTURBATION = ("scheme", "eps", "alpha", "perturbation", "interval", "normalize")


def spaces_of(recipe_name: str, recipe: Recipe, space: Space) -> dict[str, Space]:
    """The space of each sweep of a recipe, by the name of the sweep's recipe, in order.

    An empty space stands for the paper's, whose first sweep may be the baseline's.

    Raises:
        ValueError: if the paper varies nothing.
    """
    if space:
        return {recipe_name: space}
    scheme = recipe.scheme
    is_given = recipe.optimizer == "adam" or recipe.dataset == "imagenet2012"
    if scheme not in PAPER_SPACES or (scheme == "baseline" and is_given):
        raise ValueError(
            f"The paper gives all values of {recipe_name!r}, and varies none. Say what "
            "to vary: --vary KEY=V1,V2."
        )
    of_recipe = {recipe_name: PAPER_SPACES[scheme]}
    if scheme == "baseline" or is_given:
        return of_recipe
    return {_baseline(recipe_name): PAPER_SPACES["baseline"]} | of_recipe


def planned_trials(
    recipe_name: str,
    recipe: Recipe,
    space: Space,
    *,
    search: str,
    trials: int | None,
    seed: int,
) -> dict[str, int | None]:
    """The largest number of trials of each sweep of a recipe, in order.

    `None` is for Hyperband to say.

    Raises:
        TypeError, ValueError: as in `sweeps()`, but for what the data decide.
    """
    trials = check_search(search, trials, seed)
    planned: dict[str, int | None] = {}
    for name, of_sweep in spaces_of(recipe_name, recipe, space).items():
        # The baseline's sweep is a whole grid.
        is_last = name == recipe_name
        kind, most = (search, trials) if is_last else ("grid", None)
        of_name = recipe if is_last else _baseline_of(recipe_name, recipe)
        check_space(of_sweep, of_name, kind)
        check_unset(name, of_name, of_sweep)
        planned[name] = most
        if kind == "grid":
            whole = math.prod(len(values) for values in of_sweep.values())
            planned[name] = whole if most is None else min(whole, most)
    return planned


def _baseline(recipe_name: str) -> str:
    return f"{recipe_name.rpartition('-')[0]}-baseline"


def sweeps(
    recipe_name: str, recipe: Recipe, space: Space, *, output: Path, **options: Any
) -> Iterator[Sweep]:
    """The sweeps of a recipe. Run each one before asking for the next.

    An empty space stands for the paper's. RPR and NRS then train with the baseline's
    best learning rate, weight decay and batch size. The baseline's sweep comes first
    unless the paper gives these values.

    Args:
        recipe_name, recipe, options: As in `Sweep`.
        space: As in `Sweep`; empty for the paper's.
        output: Output folder. Each sweep has a folder there, named like its recipe.

    Raises:
        TypeError, ValueError: as in `Sweep`; if the paper varies nothing; or if, in
            KerasTuner's distributed mode, the baseline's sweep has not finished.
    """
    spaces = spaces_of(recipe_name, recipe, space)
    space = spaces[recipe_name]
    if len(spaces) > 1:
        # Check the second sweep before the first one runs.
        search = options.get("search", "grid")
        check_search(search, options.get("trials"), options.get("seed", 0))
        check_space(space, recipe, search)
        baseline = _baseline_sweep(recipe_name, recipe, output, options.get("data_dir"))
        if role() == "alone":
            yield baseline
        elif not baseline.is_finished:
            first = command(
                "sweep",
                baseline.recipe_name,
                # The sweep holds out images by itself.
                replace(baseline.recipe, validation_percent=recipe.validation_percent),
                output=output,
                data_dir=baseline.data_dir,
            )
            raise ValueError(
                f"The sweep of {recipe_name!r} needs the sweep of its baseline, which "
                f"has not finished. Run it first: {first}"
            )
        recipe = replace(recipe, **baseline.best.values)
    yield Sweep(recipe_name, recipe, space, folder=output / recipe_name, **options)


def _baseline_sweep(
    recipe_name: str, recipe: Recipe, output: Path, data_dir: str | None
) -> Sweep:
    """The baseline's sweep, shared by recipes that differ only in the perturbation."""
    name, recipe = _baseline(recipe_name), _baseline_of(recipe_name, recipe)
    space = PAPER_SPACES["baseline"]
    return Sweep(name, recipe, space, folder=output / name, data_dir=data_dir)


def _baseline_of(recipe_name: str, recipe: Recipe) -> Recipe:
    """The baseline's recipe, with the changes that do not concern the perturbation."""
    changed = changes(recipe_name, recipe)
    kept = {key: changed[key] for key in changed if key not in _PERTURBATION}
    return with_values(recipes()[_baseline(recipe_name)], kept)
