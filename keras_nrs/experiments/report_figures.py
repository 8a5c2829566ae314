"""Figures of finished runs: curves as in the paper's Figure 2, and differences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_nrs._files import atomic_write
from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.results import BASELINE
from keras_nrs.experiments.results import CELL
from keras_nrs.flatness.plots import BLUE
from keras_nrs.flatness.plots import COLORS
from keras_nrs.flatness.plots import LINES

# A phone can show two columns of panels with letters of 12 points.
_COLUMNS, _FONT_SIZE = 2, 12


def draw(runs: pd.DataFrame, folder: Path) -> list[str]:
    """Draw the figures that are not empty for these runs.

    Args:
        runs: Runs, as from `read_runs()`.
        folder: Folder of the PNG files, each written atomically.

    Returns:
        The names of the files.
    """
    figures = {"curves.png": _curves(runs), "differences.png": _all_differences(runs)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        with atomic_write(folder / name) as unfinished:
            figure.savefig(unfinished, format="png")
    return list(drawn)


def _panels(
    data: pd.DataFrame,
    height: float,
    draw_panel: Callable[[Any, pd.DataFrame], None],
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure with a panel for each cell, below the cell's name."""
    cells = list(data.groupby(CELL, sort=False))
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(
        # The text below the panels needs 6.6 inches, even below a single panel.
        figsize=(max(6.6, 3.4 * columns + 1.6), height * rows + 0.6),
        dpi=110,
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes, (cell, of_cell) in zip(panels.flat, cells, strict=False):
        draw_panel(axes, of_cell)
        axes.set_title(", ".join(map(str, cell)), fontsize=_FONT_SIZE + 1)
        axes.tick_params(labelsize=_FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    return figure, panels


def _curves(runs: pd.DataFrame) -> Figure | None:
    """Accuracy after each epoch, as in Figure 2: mean and deviation over seeds.

    A dashed line marks the baseline's last accuracy.
    """
    histories = []
    for row in runs[[*CELL, "arm", "folder"]].to_dict("records"):
        path = Path(row["folder"]) / "history.csv"
        if path.exists():
            history = pd.read_csv(path)[["epoch", "val_accuracy"]]
            histories.append(history.assign(**row))
    if not histories:
        return None

    def draw_panel(axes: Any, cell: pd.DataFrame) -> None:
        for i, (arm, of_arm) in enumerate(cell.groupby("arm", sort=False)):
            by_epoch = 100 * of_arm.groupby("epoch")["val_accuracy"].agg(
                ["mean", "std"]
            )
            epochs, mean = by_epoch.index + 1, by_epoch["mean"]
            spread = by_epoch["std"].fillna(0)
            color = COLORS[i % len(COLORS)]
            style = LINES[i % len(LINES)]
            axes.plot(epochs, mean, style, color=color, label=arm, linewidth=1.2)
            axes.fill_between(
                epochs, mean - spread, mean + spread, color=color, alpha=0.15
            )
            if arm == BASELINE:
                axes.axhline(
                    mean.iloc[-1], color="black", linestyle="--", linewidth=0.8
                )
        axes.set_xlabel("epoch", fontsize=_FONT_SIZE)
        axes.legend(fontsize=_FONT_SIZE - 2, frameon=False)

    figure, panels = _panels(pd.concat(histories), 2.8, draw_panel)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy on held-out samples (%)", fontsize=_FONT_SIZE)
    return figure


def _all_differences(runs: pd.DataFrame) -> Figure | None:
    """Differences in accuracy to the baseline, with 95 % intervals."""
    differences = paired_differences(runs, "test_accuracy")
    if differences.empty:
        return None
    arms = list(dict.fromkeys(differences["arm"]))

    def draw_panel(axes: Any, cell: pd.DataFrame) -> None:
        rows = [arms.index(arm) for arm in cell["arm"]]
        axes.axvline(0, color="0.6", linewidth=1)
        axes.errorbar(
            100 * cell["mean"],
            rows,
            xerr=100 * np.nan_to_num(cell["width"]),
            fmt="o",
            markersize=4,
            color=BLUE,
            elinewidth=1,
        )
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)

    height = 0.26 * len(arms) + 0.7
    figure, panels = _panels(differences, height, draw_panel, sharey=True)
    panels[0, 0].set_yticks(range(len(arms)), arms)
    panels[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(
        "test accuracy - that of the baseline (points), 95 % interval",
        fontsize=_FONT_SIZE + 1,
    )
    return figure
