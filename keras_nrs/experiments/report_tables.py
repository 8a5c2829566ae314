"""Tables of finished runs in the layouts of the paper, with its numbers beside them."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
import pandas as pd

from keras_nrs.experiments import published
from keras_nrs.experiments.paired_tests import adjusted
from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.results import CELL
from keras_nrs.experiments.results import SCHEME_LABELS
from keras_nrs.experiments.t_test import mean_width
from keras_nrs.experiments.t_test import with_interval

_SCHEMES = {label: scheme for scheme, label in SCHEME_LABELS.items()}
IMAGENET = "imagenet2012"
# Measurements other than the accuracy: heading, factor, digits after the point.
_MEASURES = {
    "test_cross_entropy": ("test loss (nats)", 1, 3),
    "test_calibration_error": ("calibration error (%)", 100, 2),
    "model_divergence": ("model divergence (nats)", 1, 4),
}
_HEADINGS = {
    "last_layer_eigenvalue": "last layer",
    "last_layer_kfra_eigenvalue": "last layer, KFRA",
    "eigenvalue": "all weights",
}
# Measurements of the means over cells: name, factor, digits after the point.
_OVERALL = {
    "test_accuracy": ("test accuracy (points)", 100, 2),
    "test_cross_entropy": ("test loss (nats)", 1, 3),
}
# Medians over seeds: heading, factor, digits after the point.
_COSTS = {
    "seconds_per_step": ("time per step (ms)", 1000, 1),
    "peak_memory_mib": ("peak memory (MiB)", 1, 0),
    "training_seconds": ("training (s)", 1, 0),
}


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        name: Name of its file, without the suffix.
        title: Says what the table shows and how to read a cell.
        cells: Texts under their headings. The index is not shown.
    """

    name: str
    title: str
    cells: pd.DataFrame


def tables(runs: pd.DataFrame) -> list[Table]:
    """All tables that are not empty for these runs.

    Args:
        runs: Runs, as from `read_runs()`.
    """
    runs = runs.copy()
    if "test_cross_entropy" not in runs:
        runs["test_cross_entropy"] = runs.get("test_loss")
    made = [
        _accuracies(runs[runs["dataset"] != IMAGENET]),
        _imagenet(runs[runs["dataset"] == IMAGENET]),
        _eigenvalues(runs),
        _differences(runs),
        *(_overall(runs, measure) for measure in _OVERALL),
        _measures(runs),
        _costs(runs),
    ]
    return [table for table in made if len(table.cells)]


def _mean_and_spread(values: pd.Series, digits: int) -> str:
    """Mean ± standard deviation, with at least `digits` digits after the point.

    Small numbers get up to 6 digits after the point, to show two that are not 0.
    """
    values = values.dropna()
    if values.empty:
        return ""
    mean = values.mean()
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    largest = max(abs(mean), spread)
    if 0 < largest < 1:
        digits = max(digits, min(6, 1 - math.floor(math.log10(largest))))
    text = f"{mean:.{digits}f}"
    return f"{text} ± {spread:.{digits}f}" if len(values) > 1 else text


def _beside(
    text: str, numbers: dict[published.Cell, published.Published], cell: Sequence[str]
) -> str:
    """The text of a cell, followed by the published number if there is one."""
    *names, arm = cell
    label, _, settings = arm.partition(", ")
    # "NRS, eps=0.5" is the paper's NRS; a variant such as "NRS, ball" is not.
    scheme = _SCHEMES.get(label, "") if "=" in settings or not settings else ""
    number = numbers.get((*names, scheme))  # type: ignore[arg-type]
    return text if number is None else f"{text} [{number}]"


def _network_name(network: str) -> str:
    return published.NETWORK_NAMES.get(network, network)


def _seeds(runs: pd.DataFrame) -> str:
    counts = runs.groupby([*CELL, "arm"])["seed"].count()
    few, many = counts.min(), counts.max()
    return f"seeds: {few}" if few == many else f"seeds: {few} to {many}"


def _accuracies(runs: pd.DataFrame) -> Table:
    """Table 1: rows are networks and arms, columns data sets and augmentations."""
    columns = runs[["dataset", "augmentation"]].drop_duplicates().to_numpy().tolist()
    rows = []
    for network, of_network in runs.groupby("network", sort=False):
        for arm in dict.fromkeys(of_network["arm"]):
            row = {"network": _network_name(str(network)), "training": arm}
            for dataset, augmentation in columns:
                cell = dataset, network, augmentation, arm
                found = _of_cell(of_network, cell)
                text = _mean_and_spread(100 * found["test_accuracy"], 2)
                row[f"{dataset}, {augmentation}"] = _beside(
                    text, published.ACCURACY, cell
                )
            rows.append(row)
    title = "Table 1. Test accuracy (%): mean ± standard deviation"
    if len(runs):
        title += f", {_seeds(runs)} [the paper's]"
    return Table("table1", title, pd.DataFrame(rows))


def _of_cell(runs: pd.DataFrame, cell: Sequence[Any]) -> pd.DataFrame:
    """The rows of one cell and arm."""
    return runs[(runs[[*CELL, "arm"]] == list(cell)).all(axis=1)]


def _by_cell(
    runs: pd.DataFrame, row: Callable[[tuple[str, ...], pd.DataFrame], dict[str, Any]]
) -> pd.DataFrame:
    """A row for each cell and arm: their names, then the values that `row` returns."""
    rows = []
    for key, found in runs.groupby([*CELL, "arm"], sort=False):
        dataset, network, augmentation, arm = key
        names = {
            "data": f"{dataset}, {augmentation}",
            "network": _network_name(network),
            "training": arm,
        }
        rows.append(names | row(key, found))
    return pd.DataFrame(rows)


def _imagenet(runs: pd.DataFrame) -> Table:
    """Table 2: top-1 and top-5 accuracy on ImageNet."""

    def row(cell: tuple[str, ...], found: pd.DataFrame) -> dict[str, Any]:
        top_1 = _mean_and_spread(100 * found["test_accuracy"], 2)
        values = {"top-1 accuracy": _beside(top_1, published.ACCURACY, cell)}
        # Files of runs may lack it.
        if "test_top_5_accuracy" in found:
            top_5 = _mean_and_spread(100 * found["test_top_5_accuracy"], 2)
            values["top-5 accuracy"] = _beside(top_5, published.TOP_5_ACCURACY, cell)
        return values

    title = "Table 2. ImageNet, test accuracy (%): mean ± standard deviation"
    return Table("table2", f"{title} [the paper's]", _by_cell(runs, row))


def _eigenvalues(runs: pd.DataFrame) -> Table:
    """Table 3: exact eigenvalues, and the paper's estimate where it was measured."""
    title = (
        "Table 3. Largest eigenvalue of the last layer's Hessian [the paper's] and of "
        "the whole one; ratio to the baseline with the same settings and seed: "
        "geometric mean, 95 % interval"
    )
    present = [name for name in _HEADINGS if name in runs]
    measured = runs.dropna(subset=present, how="all") if present else runs[:0]
    ratios = {
        name: paired_differences(measured, name, log=True)
        for name in present
        if "kfra" not in name
    }

    def row(cell: tuple[str, ...], found: pd.DataFrame) -> dict[str, Any]:
        values = {}
        for name in present:
            heading, text = _HEADINGS[name], _mean_and_spread(found[name], 2)
            if name in ratios:
                values[heading] = text
                values[f"ratio, {heading}"] = _ratio(ratios[name], cell)
            else:
                values[heading] = _beside(text, published.EIGENVALUE, cell)
        return values

    return Table("table3", title, _by_cell(measured, row))


def _ratio(ratios: pd.DataFrame, cell: tuple[str, ...]) -> str:
    """The geometric mean of ratios to the baseline, and its 95 % interval."""
    found = _of_cell(ratios, cell) if len(ratios) else ratios
    if found.empty:
        return ""
    mean, width = found.iloc[0][["mean", "width"]]
    if np.isnan(width):
        return f"{np.exp(mean):.2f}"
    low, high = np.exp([mean - width, mean + width])
    return f"{np.exp(mean):.2f} ({low:.2f} to {high:.2f})"


def _differences(runs: pd.DataFrame) -> Table:
    """Differences in accuracy to the baseline, with paired t-tests."""
    title = (
        "Test accuracy - that of the baseline with the same settings and seed "
        "(points): mean ± half its 95 % interval; p of the paired t-test, and adjusted "
        "for all rows (Benjamini and Hochberg)"
    )
    found = paired_differences(runs, "test_accuracy")
    if len(found):
        found["adjusted"] = adjusted(found["p"])

    def row(cell: tuple[str, ...], of_arm: pd.DataFrame) -> dict[str, Any]:
        tests = _of_cell(found, cell) if len(found) else found
        if tests.empty:
            baseline = of_arm["baseline"].iloc[0]
            return {"seeds": 0, "difference": f"no run of {baseline!r} with its seeds"}
        test = tests.iloc[0]
        return {
            "seeds": test["n"],
            "difference": with_interval(100 * test["mean"], 100 * test["width"]),
            "higher / lower": f"{test['higher']} / {test['lower']}",
            "p": _p(test["p"]),
            "adjusted p": _p(test["adjusted"]),
        }

    cells = _by_cell(runs[runs["arm"] != runs["baseline"]], row)
    return Table("differences", title, cells.fillna(""))


def _p(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _overall(runs: pd.DataFrame, measure: str) -> Table:
    """For each arm, the mean over cells of its differences to the baseline."""
    name, scale, digits = _OVERALL[measure]
    found = paired_differences(runs, measure)
    title = (
        f"Mean over data sets, augmentations and networks of the difference in {name} "
        "± half its 95 % interval, and in how many of them it is above or below 0 with "
        "an adjusted p < 0.05"
    )
    file = f"overall_{measure}"
    if found.empty or (found.groupby("arm").size() < 2).all():
        return Table(file, title, pd.DataFrame())
    found["is_clear"] = adjusted(found["p"]) < 0.05
    rows = []
    for arm, of_arm in found.groupby("arm", sort=False):
        means = of_arm["mean"]
        clear = means[of_arm["is_clear"]]
        width = scale * mean_width(of_arm)
        mean = with_interval(scale * means.mean(), width, digits)
        rows.append(
            {
                "training": arm,
                "cells": len(of_arm),
                "mean difference": mean,
                "clearly above": int((clear > 0).sum()),
                "clearly below": int((clear < 0).sum()),
                "highest": _with_cell(of_arm.loc[means.idxmax()], scale, digits),
                "lowest": _with_cell(of_arm.loc[means.idxmin()], scale, digits),
            }
        )
    return Table(file, title, pd.DataFrame(rows))


def _with_cell(row: pd.Series, scale: float, digits: int) -> str:
    """A difference, followed by the names of its cell."""
    difference = with_interval(scale * row["mean"], scale * row["width"], digits)
    names = row["dataset"], row["augmentation"], _network_name(row["network"])
    return f"{difference} ({', '.join(names)})"


def _measures(runs: pd.DataFrame) -> Table:
    """The measurements other than the accuracy."""
    present = [m for m in _MEASURES if m in runs and runs[m].notna().any()]

    def row(_: tuple[str, ...], found: pd.DataFrame) -> dict[str, Any]:
        return {
            heading: _mean_and_spread(scale * found[name], digits)
            for name in present
            for heading, scale, digits in [_MEASURES[name]]
        }

    cells = _by_cell(runs, row) if present else pd.DataFrame()
    return Table("measures", "Mean ± standard deviation over seeds", cells)


def _costs(runs: pd.DataFrame) -> Table:
    """The cost of a run: medians over seeds."""
    present = [name for name in _COSTS if name in runs]
    medians = runs.groupby([*CELL, "arm"])[present].median()

    def row(cell: tuple[str, ...], of_arm: pd.DataFrame) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in present:
            (heading, scale, digits), median = _COSTS[name], medians[name][cell]
            is_known = not np.isnan(median)
            values[heading] = f"{scale * median:.{digits}f}" if is_known else ""
            if name == "seconds_per_step":
                baseline = medians[name].get(
                    (*cell[:-1], of_arm["baseline"].iloc[0]), 0
                )
                has_ratio = is_known and baseline > 0
                values["baselines"] = f"{median / baseline:.2f}" if has_ratio else ""
        return values

    cells = _by_cell(runs, row) if present else pd.DataFrame()
    title = "Cost: median over seeds, and time per step in baselines"
    return Table("costs", title, cells)
