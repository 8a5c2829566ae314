"""The demo's table and figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullFormatter
from matplotlib.ticker import StrMethodFormatter
from rich.table import Table

from keras_nrs._files import atomic_write
from keras_nrs.experiments.demo import ARMS
from keras_nrs.experiments.demo import BASELINE
from keras_nrs.experiments.demo import Array
from keras_nrs.experiments.demo import Run
from keras_nrs.experiments.t_test import t_test
from keras_nrs.experiments.t_test import with_interval
from keras_nrs.flatness.palette import styles


def values(runs: Sequence[Run], arm: str, name: str) -> Array:
    """One measurement of an arm, ordered by seed."""
    of_arm = sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
    return np.array([getattr(run, name) for run in of_arm])


# Measurement, factor and format of a column.
_COLUMNS = {
    "test accuracy (%)": ("test_accuracy", 100, ".2f"),
    "test loss (nats)": ("test_loss", 1, ".3f"),
    "model divergence (nats)": ("model_divergence", 1, ".4f"),
    "eigenvalue": ("eigenvalue", 1, ".3f"),
}
# Label and measurement of a panel, below the one of differences.
_PANELS = {
    "test loss (nats)": "test_loss",
    "model divergence (nats), log scale": "model_divergence",
    "largest eigenvalue of the last layer's Hessian\n"
    "(nats per squared weight), log scale": "eigenvalue",
}


def results_table(runs: Sequence[Run]) -> Table:
    """A row for each arm: means and standard deviations over the seeds.

    The last column is the mean difference in accuracy to the baseline of the same seed,
    and half the width of its 95 % confidence interval.
    """
    baseline = values(runs, BASELINE, "test_accuracy")
    table = Table(
        title=f"Handwritten digits, {len(baseline)} seeds: mean ± standard deviation",
        caption="Eigenvalue: the largest of the last layer's Hessian on the training "
        "images. Gain: accuracy - that of the baseline with the same seed, mean ± half "
        "its 95 % confidence interval.",
    )
    table.add_column("arm", no_wrap=True)
    for heading in (*_COLUMNS, "gain (points)"):
        table.add_column(heading, justify="right")
    for arm in ARMS:
        cells = []
        for name, scale, form in _COLUMNS.values():
            x = scale * values(runs, arm, name)
            cells.append(f"{np.mean(x):{form}} ± {np.std(x, ddof=1):{form}}")
        test = t_test(100 * (values(runs, arm, "test_accuracy") - baseline))
        gain = with_interval(test.mean, test.width)
        table.add_row(arm, *cells, "" if arm == BASELINE else gain)
    return table


def _draw_panel(axes: Any, points: Sequence[Array], label: str) -> None:
    """Draw a row of dots for each arm, and a bar for their mean."""
    style_of = styles(ARMS)
    for row, (x, arm) in enumerate(zip(points, ARMS, strict=True)):
        color, _, marker = style_of[arm]
        rows = row + np.linspace(-0.2, 0.2, len(x))
        axes.scatter(x, rows, s=16, marker=marker, color=color, alpha=0.5, linewidths=0)
        axes.plot([np.mean(x)] * 2, [row - 0.36, row + 0.36], color=color, linewidth=3)
    axes.set_xlabel(label, fontsize=12)
    axes.tick_params(labelsize=12)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if "log scale" in label:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def draw_results(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG of all runs: one panel for each measurement."""
    accuracy = {arm: 100 * values(runs, arm, "test_accuracy") for arm in ARMS}
    differences = [accuracy[arm] - accuracy[BASELINE] for arm in ARMS]
    # One panel above the other, so that a phone shows large letters.
    figure = Figure(figsize=(6.4, 11), dpi=150, layout="constrained")
    panels = figure.subplots(4, 1, sharey=True)
    label = "test accuracy - baseline of the same seed (points)"
    _draw_panel(panels[0], differences, label)
    panels[0].axvline(0, color="0.6", linewidth=1, zorder=0)
    for axes, (label, name) in zip(panels[1:], _PANELS.items(), strict=True):
        _draw_panel(axes, [values(runs, arm, name) for arm in ARMS], label)
    panels[0].set_yticks(range(len(ARMS)), ARMS)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"Handwritten digits, {len(differences[0])} seeds:\n"
        "a dot for each seed, a bar for the mean",
        fontsize=14,
    )
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
