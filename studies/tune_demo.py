"""Chooses the demo's settings by accuracy on validation images.

    KERAS_BACKEND=jax python -m studies.tune_demo

Two grids of 20 settings each are trained with `SEEDS`, which the demo does not use:

1. learning rate x weight decay of the baseline;
2. eps x alpha of NRS, with the baseline's best learning rate and weight decay, so that
   all arms of the demo share an optimizer tuned without NRS.

RPR and NRS with alpha 0 are controls with the eps of NRS, and are not tuned. Neither
training nor validation uses test images, which are the same for all seeds. The demo
trains on other images of the same pool of 1,000.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from keras_nrs.experiments.demo import BASELINE
from keras_nrs.experiments.demo import NRS
from keras_nrs.experiments.demo import Settings
from keras_nrs.experiments.demo import accuracy_and_loss
from keras_nrs.experiments.demo import compiled_model
from keras_nrs.experiments.demo import train
from keras_nrs.experiments.demo_data import load_split

SEEDS = range(1000, 1006)
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
WEIGHT_DECAYS = (0.01, 0.1, 0.3, 1.0)
EPS = (0.1, 0.2, 0.3, 0.4, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 4.0)

Grid = dict[tuple[float, float], float]


def validation_accuracy(
    model: keras.Model, settings: Settings, *, seeds: Iterable[int] = SEEDS
) -> float:
    """Mean accuracy on the validation images after one training for each seed."""
    accuracies = []
    for seed in seeds:
        split = load_split(train_images=settings.train_images, seed=seed)
        train(model, split, epochs=settings.epochs, seed=seed)
        accuracy, _ = accuracy_and_loss(model, split.x_validation, split.y_validation)
        accuracies.append(accuracy)
    return float(np.mean(accuracies))


def tune_baseline(settings: Settings, *, seeds: Iterable[int] = SEEDS) -> Grid:
    """Validation accuracy for each (learning rate, weight decay)."""
    grid = {}
    for rate, decay in track(
        list(product(LEARNING_RATES, WEIGHT_DECAYS)), description=BASELINE
    ):
        trial = replace(settings, learning_rate=rate, weight_decay=decay)
        model = compiled_model(BASELINE, trial)
        grid[rate, decay] = validation_accuracy(model, trial, seeds=seeds)
    return grid


def tune_nrs(settings: Settings, *, seeds: Iterable[int] = SEEDS) -> Grid:
    """Validation accuracy for each (eps, alpha)."""
    grid = {}
    model = compiled_model(NRS, settings)
    for eps, alpha in track(list(product(EPS, ALPHAS)), description=NRS):
        model.eps, model.alpha = eps, alpha
        grid[eps, alpha] = validation_accuracy(model, settings, seeds=seeds)
    return grid


def best(grid: Grid) -> tuple[float, float]:
    """The setting with the highest accuracy, the first of several."""
    return max(grid, key=lambda setting: grid[setting])


def grid_table(title: str, rows: str, columns: str, grid: Grid) -> Table:
    """Accuracies in percent, with the best in bold."""
    firsts, seconds = (
        list(dict.fromkeys(values)) for values in zip(*grid, strict=True)
    )
    table = Table(title=title)
    table.add_column(f"{rows} \\ {columns}")
    for second in seconds:
        table.add_column(f"{second:g}", justify="right")
    for first in firsts:
        cells = [
            f"[bold]{100 * grid[first, second]:.2f} *[/]"
            if (first, second) == best(grid)
            else f"{100 * grid[first, second]:.2f}"
            for second in seconds
        ]
        table.add_row(f"{first:g}", *cells)
    return table


def main() -> None:
    """Print both grids."""
    console = Console()
    settings = Settings()
    grid = tune_baseline(settings)
    title = f"{BASELINE}: validation accuracy (%)"
    console.print(grid_table(title, "learning rate", "weight decay", grid))
    rate, decay = best(grid)
    settings = replace(settings, learning_rate=rate, weight_decay=decay)
    grid = tune_nrs(settings)
    title = f"{NRS}: validation accuracy (%), {rate=:g}, {decay=:g}"
    console.print(grid_table(title, "eps", "alpha", grid))


if __name__ == "__main__":
    main()
