"""What `tune()` returns."""

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import keras
import numpy as np

from keras_nrs.tuning.measures import CALIBRATION
from keras_nrs.tuning.measures import LOSS
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.measures import is_accuracy
from keras_nrs.tuning.race import Race
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.verdict import Verdict
from keras_nrs.tuning.verdict import with_interval

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What `keras_nrs.tune` has found out. `print(result)` shows it as a table.

    Attributes:
        decision: What to do, in a sentence.
        best: Name of the setting to train with; `"baseline"` to keep the model as it
            is.
        best_arguments: Its arguments of `keras_nrs.wrap()`; `None` for a plain
            training.
        best_epochs: Its number of epochs.
        best_model: The model of its best training, not wrapped. Its optimizer is new.
        table: A dict for each setting: its name, cost and measurements, as means and
            standard deviations (`..._deviation`) over seeds, and `difference` and
            `width`: the mean paired difference of `metric` to the baseline and half its
            95 % confidence interval; `..._same_cost` to the longest plain training that
            costs no more. `is_judged` says whether these are of seeds that judge, or of
            those that chose. `pandas.DataFrame(result.table)` makes a table of it.
        runs: A dict for each training: its setting, seed, measurements, seconds, and
            the history of `fit()`.
        metric: Name of the metric that has decided.
        not_run: Names of the settings for which the budget did not suffice.
        seconds: Time of all trainings, those of earlier calls in the folder too.
    """

    decision: str
    best: str
    best_arguments: dict[str, Any] | None
    best_epochs: int
    best_model: keras.Model = field(repr=False)
    table: list[Row] = field(repr=False)
    runs: list[Row] = field(repr=False)
    metric: str
    not_run: list[str]
    seconds: float

    def __str__(self) -> str:
        shown = [_shown(row, self.metric) for row in self.table]
        names = [name for name in shown[0] if any(row[name] for row in shown)]
        lines = [names, *([row[name] for name in names] for row in shown)]
        # Elsewhere, as in a notebook or a file, lines may be long.
        is_terminal = sys.stdout is not None and sys.stdout.isatty()
        limit = shutil.get_terminal_size().columns if is_terminal else math.inf
        text = _in_blocks(lines, limit)
        notes = [
            "Means of validation data, ± standard deviations over seeds; differences "
            "± half their 95 % intervals.",
            "cost: passes through the model in plain trainings, counted. s: seconds of "
            "a training.",
        ]
        if not all(row["is_judged"] for row in self.table):
            notes.append("(1), (2): the number of seeds that chose, and do not judge.")
        if any(row["failed"] for row in self.table):
            notes.append("2 of 3: the others failed, with a loss that is not finite.")
        if self.not_run:
            notes.append(f"Not run, for the budget: {'; '.join(self.not_run)}.")
        return "\n".join([*text, "", *notes, "", self.decision])


def _in_blocks(lines: Sequence[Sequence[str]], limit: float) -> list[str]:
    """The lines of a table, one block of columns below the other if it is too wide."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    blocks: list[list[int]] = []
    for i in range(1, len(widths)):
        if not blocks or sum(2 + widths[j] for j in [*blocks[-1], i]) > limit + 2:
            blocks.append([0])  # Each has the names.
        blocks[-1].append(i)
    text: list[str] = []
    for block in blocks:
        if text:
            text.append("")
        for line in lines:
            # Names to the left, numbers to the right.
            cells = [line[i].rjust(widths[i]) if i else line[i] for i in block]
            text.append("  ".join([cells[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return text


def table_of(
    settings: Sequence[Setting], race: Race, verdict: Verdict, metric: Metric
) -> list[Row]:
    """A row for each setting that was trained."""
    rows = []
    for setting in settings:
        is_judged = setting.name in race.judging
        found = (race.judging if is_judged else race.choosing).get(setting.name)
        if found is None:
            continue
        of_setting = list(found.values())
        row: Row = {
            "setting": setting.name,
            "arguments": setting.arguments,
            "cost": setting.cost,
            "is_judged": is_judged,
            "seeds": len(of_setting),
            "failed": sum(run["failed"] for run in of_setting),
        }
        measured = [run["measured"] for run in of_setting if not run["failed"]]
        for name in dict.fromkeys([metric.name, *of_setting[0]["measured"]]):
            values = [run[name] for run in measured]
            row[name] = float(np.mean(values)) if values else math.nan
            deviation = np.std(values, ddof=1) if len(values) > 1 else math.nan
            row[f"{name}_deviation"] = float(deviation)
        row["seconds"] = float(np.mean([run["seconds"] for run in of_setting]))
        differences = verdict.differences.get(setting.name, []) if is_judged else []
        # In the order of their costs, some of which may be lower than the baseline's.
        same_cost = [d for d in differences[-1:] if not d.rival.is_baseline]
        for ending, found_one in (
            ("", [d for d in differences if d.rival.is_baseline]),
            ("_same_cost", same_cost),
        ):
            last = found_one[-1] if found_one else None
            row[f"difference{ending}"] = last.mean if last else math.nan
            row[f"width{ending}"] = last.width if last else math.nan
        rows.append(row)
    return rows


def _shown(row: Row, metric: str) -> dict[str, str]:
    """A row of the table as text."""
    decisive = Metric(metric, 0)
    finished = row["seeds"] - row["failed"]
    seeds = f"{finished} of {row['seeds']}" if row["failed"] else f"{row['seeds']}"
    cells = {
        "setting": row["setting"],
        "cost": f"{row['cost']:g}",
        "seeds": seeds if row["is_judged"] else f"({seeds})",
    }
    accuracies = [Metric(name, 1) for name in row if is_accuracy(name)]
    for shown in {
        m.name: m for m in (decisive, *accuracies, LOSS, CALIBRATION)
    }.values():
        mean = row.get(shown.name, math.nan)
        deviation = row[f"{metric}_deviation"] if shown.name == metric else math.nan
        cells[shown.heading] = with_interval(mean, deviation, shown).removeprefix("+")
    cells["s"] = f"{row['seconds']:.1f}"
    for heading, ending in (
        ("vs baseline", ""),
        ("vs same cost", "_same_cost"),
    ):
        mean, width = row[f"difference{ending}"], row[f"width{ending}"]
        cells[heading] = with_interval(mean, width, decisive)
    return cells
