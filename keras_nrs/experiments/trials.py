"""Results of the trials of a sweep."""

import hashlib
import math
import statistics
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from keras_nrs._files import write_text
from keras_nrs.experiments.space import Values

# In bytes.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Result:
    """The result of a trial.

    Attributes:
        values: The trial's values of the keys in the space.
        epochs: Number of epochs before the measurement.
        scores: Validation accuracy of each seed; empty if a training diverged.
        seconds: Time of all its trainings; NaN if one diverged.
        is_whole: Whether `epochs` is the recipe's number. Hyperband tries fewer, too.
    """

    values: Values
    epochs: int
    scores: tuple[float, ...] = ()
    seconds: float = math.nan
    is_whole: bool = True

    @property
    def score(self) -> float:
        """Mean of the scores; NaN if there are none."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def name(self) -> str:
        """The name of the trial's folder, made from its values.

        A long one, which not every system allows, is cut off and ends in a checksum.
        """
        values = ",".join(f"{key}={value}" for key, value in self.values.items())
        name = values.replace("/", "-")
        if len(name.encode()) <= _LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        start = name.encode()[: _LONGEST_NAME - len(digest) - 1].decode(errors="ignore")
        return f"{start},{digest}"

    def __str__(self) -> str:
        if not self.scores:
            return "diverged"
        if len(self.scores) == 1:
            return f"{self.score:.4f}"
        return f"{self.score:.4f} ± {statistics.stdev(self.scores):.4f}"


def best_first(results: Iterable[Result]) -> list[Result]:
    """The results by score, with one result for the same values: after most epochs.

    Hyperband trains some trials further, and other searches may draw values twice.
    """
    found: dict[str, Result] = {}
    for result in results:
        earlier = found.get(result.name)
        if earlier is None or earlier.epochs < result.epochs:
            found[result.name] = result
    return sorted(
        found.values(),
        key=lambda result: (bool(result.scores), result.is_whole, result.score),
        reverse=True,
    )


def to_table(title: str, results: Sequence[Result], console: Console) -> Table:
    """The table that `keras-nrs sweep` prints.

    It has a column for each key, or a single one if the console is too narrow.
    """
    keys = list(results[0].values) if results else []
    rows = [list(map(str, result.values.values())) for result in results]
    table = _table(title, keys, rows, results)
    # Without the limit of the console's own width.
    options = console.options.update(width=10_000)
    if console.measure(table, options=options).maximum <= console.width:
        return table
    pairs = [map("=".join, zip(keys, row, strict=True)) for row in rows]
    return _table(title, ["values"], [[", ".join(of_row)] for of_row in pairs], results)


def _table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Sequence[Result],
) -> Table:
    """The rows, with what was measured. A number is never wrapped or cut."""
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for heading in ("epochs", "validation\naccuracy", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, result in zip(rows, results, strict=True):
        seconds = f"{result.seconds:.0f}" if result.scores else ""
        table.add_row(*row, str(result.epochs), str(result), seconds)
    return table


def write_csv(path: Path, results: Sequence[Result], seeds: Sequence[int]) -> None:
    """Write a CSV file with a row for each result."""
    rows = []
    for result in results:
        scores = result.scores or ["diverged"] * len(seeds)
        row = result.values | {"epochs": result.epochs}
        # As texts, to write "nan" for trials that diverged.
        row["validation_accuracy"] = str(result.score)
        row |= {f"seed-{s}": score for s, score in zip(seeds, scores, strict=True)}
        rows.append(row | {"seconds": str(result.seconds)})
    write_text(path, pd.DataFrame(rows, dtype=object).to_csv(index=False))
