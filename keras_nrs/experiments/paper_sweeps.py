"""The paper's searches: the baseline's first, then those that build on it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_values
from keras_nrs.experiments.search import role
from keras_nrs.experiments.space import Space
from keras_nrs.experiments.space import check_space
from keras_nrs.experiments.sweep import Sweep
from keras_nrs.experiments.sweep import changes
from keras_nrs.experiments.sweep import check_search
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
    is_given = recipe.optimizer == "adam" or recipe.dataset == "imagenet2012"
    if not space and recipe.scheme == "baseline" and is_given:
        raise ValueError(
            f"The paper gives all values of {recipe_name!r}, and varies none. Say what "
            "to vary: --vary KEY=V1,V2."
        )
    needs_baseline = not space and recipe.scheme != "baseline" and not is_given
    space = space or PAPER_SPACES[recipe.scheme]
    if needs_baseline:
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
    name = f"{recipe_name.rpartition('-')[0]}-baseline"
    changed = changes(recipe_name, recipe)
    kept = {key: changed[key] for key in changed if key not in _PERTURBATION}
    baseline = with_values(recipes()[name], kept)
    space = PAPER_SPACES["baseline"]
    return Sweep(name, baseline, space, folder=output / name, data_dir=data_dir)
