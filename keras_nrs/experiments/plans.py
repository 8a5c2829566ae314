"""What `keras-nrs train` and `sweep` will do, in words, before data are touched."""

import os
from collections.abc import Mapping
from pathlib import Path

from keras_nrs._fashion_mnist import folder_at_hand
from keras_nrs._fashion_mnist import place_of_prepared
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import changes

DRY = "Dry run: nothing was read, trained or written."


def data_line(name: str, data_dir: str | None) -> str:
    """Where a data set is read from, and whether it has to be made there first."""
    files = folder_at_hand(data_dir) if name == "fashion_mnist" else None
    if files is not None:
        data_dir = place_of_prepared(files, data_dir)
    # TFDS reads the same variable, but takes seconds to import.
    own = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = Path(data_dir or own).expanduser()
    if os.path.isdir(folder / name):  # False for a name that no folder can have.
        state = "is there"
    elif files is not None:
        state = f"is not there yet, and is prepared from the files in {files}"
    elif name == "digits":
        state = "is not there yet, and is prepared from scikit-learn's"
    else:
        state = "is not there yet, and is downloaded or prepared first"
    return f"Data: {folder}. {name} {state}. Another folder: --data-dir"


def train_plan(
    name: str, recipe: Recipe, *, output: Path, data_dir: str | None
) -> list[str]:
    """Lines that say what `keras-nrs train` will do."""
    folder = output / name
    finished = sum((folder / f"seed-{s}/summary.json").exists() for s in recipe.seeds)
    runs, epochs = len(recipe.seeds), recipe.epochs
    return [
        _recipe_line(name, recipe),
        f"Trainings: {runs}, one for each seed, of {epochs} epochs: {runs * epochs} in "
        f"all. {finished} of them {'is' if finished == 1 else 'are'} finished.",
        data_line(recipe.dataset, data_dir),
        f"Results: {folder / 'seed-N'}. Another folder: --output",
    ]


def sweep_plan(
    name: str,
    recipe: Recipe,
    trials: Mapping[str, int | None],
    *,
    output: Path,
    data_dir: str | None,
) -> list[str]:
    """Lines that say what `keras-nrs sweep` will do.

    Args:
        name: Name of the recipe.
        recipe: The recipe, with its changes.
        trials: The largest number of trials of each sweep, by the name of its recipe,
            in order. `None` is for Hyperband to say.
        output: Folder of the sweeps.
        data_dir: Folder of the data.
    """
    runs = len(recipe.seeds)
    lines = [_recipe_line(name, recipe)]
    for of_sweep, number in trials.items():
        if number is None:
            text = "as many trials as Hyperband needs"
        else:
            text = (
                f"{number} trials, {runs} trainings each of up to {recipe.epochs} "
                f"epochs: {number * runs} trainings in all"
            )
        lines.append(f"Sweep of {of_sweep}: {text}. Results: {output / of_sweep}")
    return [*lines, data_line(recipe.dataset, data_dir)]


def _recipe_line(name: str, recipe: Recipe) -> str:
    changed = [f"{key}={value}" for key, value in changes(name, recipe).items()]
    return f"Recipe: {name}" + (f", with {', '.join(changed)}" if changed else "")
