"""Recipes that train in a moment, and runs that are made up."""

import json
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes

NRS = "digits-wide_resnet_10_1-none-nrs"
RPR = "digits-wide_resnet_10_1-none-rpr"
BASELINE = "digits-wide_resnet_10_1-none-baseline"


def digits_recipe(**changes: Any) -> Recipe:
    """The digits' NRS recipe: one epoch of two large steps, with other changes."""
    defaults = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 250}
    return replace(recipes()[NRS], **(defaults | changes))


def linear_network(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A network that compiles fast."""
    head = [keras.layers.Flatten(), keras.layers.Dense(classes)]
    return keras.Sequential([keras.Input(shape), *head])


def write_run(folder: Path, recipe: Recipe, seed: int, **summary: Any) -> None:
    """Write the files of `keras-nrs train` that reports read."""
    folder.mkdir(parents=True)
    values = {"seed": seed, "seconds_per_step": 0.1, "peak_memory_mib": 800.0}
    text = json.dumps(asdict(recipe) | {"seed": seed})
    (folder / "recipe.json").write_text(text)
    (folder / "summary.json").write_text(json.dumps(values | summary))
    (folder / "history.csv").write_text("epoch,val_accuracy\n0,0.3\n1,0.5\n")
