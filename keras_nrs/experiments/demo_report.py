"""The demo's table, figure and decision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullFormatter
from matplotlib.ticker import StrMethodFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from keras_nrs._files import atomic_write
from keras_nrs.experiments.demo import ARMS
from keras_nrs.experiments.demo import BASELINE
from keras_nrs.experiments.demo import NRS
from keras_nrs.experiments.demo import RPR
from keras_nrs.experiments.demo import Array
from keras_nrs.experiments.demo import Run
from keras_nrs.experiments.demo_data import DIGITS
from keras_nrs.experiments.demo_data import TITLES
from keras_nrs.experiments.t_test import TTest
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


def results_table(
    runs: Sequence[Run], *, data: str = DIGITS, console: Console | None = None
) -> Table:
    """A row for each arm: means and standard deviations over the seeds.

    The last column is the mean difference in accuracy to the baseline of the same seed,
    and half the width of its 95 % confidence interval.

    Args:
        runs: The runs of all arms.
        data: The set that they were trained on.
        console: Where the table is to fit. If it is too narrow, the table has no
            standard deviations.
    """
    table = _table(runs, data, has_deviations=True)
    if console is None or console.measure(table).maximum < console.width:
        return table
    return _table(runs, data, has_deviations=False)


def _table(runs: Sequence[Run], data: str, *, has_deviations: bool) -> Table:
    seeds = len(values(runs, BASELINE, "seed"))
    what = "mean ± standard deviation" if has_deviations else "means"
    table = Table(
        title=f"{TITLES[data]}, {seeds} seeds: {what}",
        caption="Eigenvalue: the largest of the last layer's Hessian on the training "
        "images.\nGain: accuracy - that of the baseline with the same seed,\n"
        "mean ± half its 95 % confidence interval.",
        box=box.HEAVY_HEAD if has_deviations else box.SIMPLE,
        padding=(0, 1 if has_deviations else 0),
        pad_edge=has_deviations,
    )
    columns = {"arm": list(ARMS)}
    for heading, (name, scale, form) in _COLUMNS.items():
        columns[heading] = [
            _cell(scale * values(runs, arm, name), form, has_deviations) for arm in ARMS
        ]
    gains = [_difference(runs, arm, BASELINE, "test_accuracy", 100) for arm in ARMS]
    texts = [with_interval(gain.mean, gain.width) for gain in gains]
    columns["gain (points)"] = ["", *texts[1:]]
    for heading, cells in columns.items():
        # Headings wrap between words, and cells not at all.
        widest = max(map(len, [*heading.split(), *cells]))
        justify: Any = "left" if heading == "arm" else "right"
        table.add_column(heading, justify=justify, width=widest)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _cell(x: Array, form: str, has_deviation: bool) -> str:
    deviation = f" ± {np.std(x, ddof=1):{form}}" if has_deviation else ""
    return f"{np.mean(x):{form}}{deviation}"


def decision(runs: Sequence[Run]) -> str:
    """What the runs say about NRS on their data.

    NRS is for use if the 95 % interval of its paired gain in accuracy is above 0.
    """
    gain = _difference(runs, NRS, BASELINE, "test_accuracy", 100)
    loss = _difference(runs, NRS, BASELINE, "test_loss")
    found = (
        f"{with_interval(gain.mean, gain.width)} points of accuracy (95 % interval, "
        f"{gain.n} pairs)."
    )
    if _is_clear(gain) and gain.mean > 0:
        return f"use NRS on these data, because it gains {found} {_rivals(runs)}"
    text = "keep the baseline on these data, because "
    if _is_clear(gain):
        text += f"NRS loses: {found}"
    else:
        text += (
            f"the gain of NRS is not distinguishable from 0: {found} More pairs narrow "
            "the interval: --seeds."
        )
    if _is_clear(loss) and loss.mean < 0:
        text += (
            f" Its test loss is lower, {with_interval(loss.mean, loss.width, 3)} nats: "
            "use it if you need probabilities, not classes alone."
        )
    return text


def _rivals(runs: Sequence[Run]) -> str:
    """What else may gain as much as NRS, whose step costs two plain ones."""
    rpr = _difference(runs, RPR, BASELINE, "test_accuracy", 100)
    over_rpr = _difference(runs, NRS, RPR, "test_accuracy", 100)
    text = "A step costs about two plain ones: try twice the epochs without NRS, too."
    if _is_clear(rpr) and rpr.mean > 0 and not _is_clear(over_rpr):
        gain = with_interval(rpr.mean, rpr.width)
        text = f"RPR gains {gain} at the cost of a plain step: try it first. {text}"
    return text


def _difference(
    runs: Sequence[Run], arm: str, other: str, name: str, scale: float = 1
) -> TTest:
    """The paired difference of two arms in a measurement."""
    return t_test(scale * (values(runs, arm, name) - values(runs, other, name)))


def _is_clear(difference: TTest) -> bool:
    """Whether the interval leaves 0 out; `False` if there is none."""
    return abs(difference.mean) > difference.width


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


def draw_results(runs: Sequence[Run], path: Path, data: str = DIGITS) -> None:
    """Write a PNG of all runs on a set: one panel for each measurement."""
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
        f"{TITLES[data]}, {len(differences[0])} seeds:\n"
        "a dot for each seed, a bar for the mean",
        fontsize=14,
    )
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
