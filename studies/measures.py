"""The store as tables of numbers: what the report compares."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from keras_nrs.experiments.paired_tests import holm
from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.results import CELL
from studies.arms import ARMS
from studies.arms import BASELINE
from studies.arms import TWICE
from studies.plan import CHOICE_SEEDS
from studies.plan import TEST_SEEDS
from studies.plan import choice_runs
from studies.plan import chosen
from studies.store import Run
from studies.store import Store


class Measure(NamedTuple):
    """How a measure is shown.

    Attributes:
        heading: Name and unit.
        scale: Factor from the stored number.
        digits: Digits after the point.
    """

    heading: str
    scale: float
    digits: int


MEASURES = {
    "accuracy": Measure("accuracy (%)", 100, 2),
    "loss": Measure("loss (nats)", 1, 3),
    "calibration_error": Measure("calibration error (%)", 100, 1),
    "scaled_calibration_error": Measure("... with temperature (%)", 100, 1),
    "corrupted": Measure("accuracy, corrupted inputs (%)", 100, 1),
    "rounded_4_filter": Measure("accuracy, kernels of 4 bits (%)", 100, 1),
    "rounded_3_filter": Measure("accuracy, kernels of 3 bits (%)", 100, 1),
    "rounded_2_filter": Measure("accuracy, kernels of 2 bits (%)", 100, 1),
    "noise_filter_0.2": Measure(
        "accuracy, noise of 20 % of each filter's norm (%)", 100, 1
    ),
    "noise_largest_0.1": Measure(
        "accuracy, noise of 10 % of the largest weight (%)", 100, 1
    ),
    "best_epoch_accuracy": Measure("accuracy, best epoch (%)", 100, 2),
    "eigenvalue": Measure("largest eigenvalue", 1, 1),
    "train_accuracy": Measure("training accuracy (%)", 100, 1),
    "cpu_seconds_per_step": Measure("CPU time of a step (ms)", 1000, 1),
}
# Measures that are shares of samples: a failed run has those of chance.
_SHARES = ("accuracy", "corrupted", "rounded_", "noise_", "best_epoch", "int")
REFERENCES = (BASELINE, TWICE)


def measurements(store: Store, task: str) -> pd.DataFrame:
    """The test runs of a task with the settings that the arms have chosen.

    Returns:
        A row for each run: `arm`, `seed`, `failed`, and the measures. A failed run has
        the accuracy and the loss of chance, and no other measure than shares.
    """
    rows = []
    for arm in ARMS:
        settings = chosen(store, task, arm)
        if settings is None:
            continue
        for seed in TEST_SEEDS:
            run = Run(task=task, arm=arm, stage="test", settings=settings, seed=seed)
            measured = store.get(run)
            if measured is not None:
                rows.append({"arm": arm, "seed": seed, "failed": False} | measured)
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    found["failed"] = found["failed"].astype(bool)
    shares = [name for name in found if name.startswith(_SHARES)]
    for name in shares:
        is_missing = found["failed"] & found[name].isna()
        if found[name].notna().any():
            found.loc[is_missing, name] = found.loc[is_missing, "accuracy"]
    return found


def compared(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Paired differences of the arms of a task to both references.

    p-values are adjusted by Holm for all comparisons of this task and measure: those
    of the main arms among themselves, and those of the others among themselves.

    Args:
        runs: As from `measurements()`.
        measure: A column of it.

    Returns:
        A row for each pair of arms: `arm`, `reference`, `adjusted`, and the attributes
        of a `TTest`.
    """
    runs = runs.assign(**dict.fromkeys(CELL, ""))
    parts = [
        paired_differences(runs.assign(baseline=reference), measure).assign(
            reference=reference
        )
        for reference in REFERENCES
        if (runs["arm"] == reference).any()
    ]
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame()
    found = pd.concat(parts, ignore_index=True)
    # The second reference against the first is in the table once.
    found = found[~((found["arm"] == BASELINE) & (found["reference"] == TWICE))]
    is_main = found["arm"].map(lambda arm: ARMS[arm].is_main)
    adjusted = found.groupby(is_main)["p"].transform(holm)
    return found.assign(adjusted=adjusted)


def validation_gains(store: Store, tasks: list[str]) -> pd.DataFrame:
    """How much each setting of NRS gains on validation samples.

    Returns:
        A row for each perturbation, eps and alpha: the mean gain in accuracy over the
        baseline's choice, paired by seed, for each task (NaN: not finished), and the
        worst and the mean of them.
    """
    gains: dict[str, dict[str, float]] = {}
    for task in tasks:
        shared = chosen(store, task, BASELINE)
        if shared is None:
            continue
        of_baseline = [
            _validation(
                store,
                Run(task=task, arm=BASELINE, stage="choice", settings=shared, seed=s),
            )
            for s in CHOICE_SEEDS
        ]
        for arm in ARMS:
            candidates = choice_runs(store, task, arm) or {}
            for runs in candidates.values() if len(candidates) > 1 else ():
                settings = runs[0].settings
                if settings.get("scheme") != "nrs" or settings.get("epochs"):
                    continue
                of_arm = [_validation(store, run) for run in runs]
                others = {k: v for k, v in settings.items() if k not in shared}
                gain = float(np.mean(of_arm) - np.mean(of_baseline))
                gains.setdefault(_setting_name(others), {})[task] = gain
    found = pd.DataFrame(gains).T.reindex(columns=tasks)
    found.insert(0, "worst", found[tasks].min(axis=1))
    found.insert(1, "mean", found[tasks].mean(axis=1))
    return found.dropna(subset="worst").sort_values("worst", ascending=False)


def _validation(store: Store, run: Run) -> float:
    measured = store.get(run)
    return np.nan if measured is None else measured["validation_accuracy"]


def _setting_name(settings: dict[str, object]) -> str:
    hidden = {"scheme", "normalize", "beta"}
    return ", ".join(
        f"{value}" if name == "perturbation" else f"{name} {value:g}"
        for name, value in settings.items()
        if name not in hidden
    )
