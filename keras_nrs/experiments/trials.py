"""What came out of the trials of a sweep."""

import csv
import math
import statistics
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from keras_nrs._files import atomic_write
from keras_nrs.experiments.space import Values


@dataclass(frozen=True)
class Result:
    """What came out of a trial.

    Attributes:
        values: Of the keys of the space.
        epochs: After which it was measured.
        scores: Validation accuracy of each seed; empty if a training diverged.
        seconds: Of all its trainings; NaN if one diverged.
        is_whole: Whether these are all epochs of the recipe; not always in Hyperband.
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
        """Values as in the name of the trial's folder."""
        values = ",".join(f"{key}={value}" for key, value in self.values.items())
        return values.replace("/", "-")

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Larger for a better one."""
        return bool(self.scores), self.is_whole, self.score

    def __str__(self) -> str:
        if not self.scores:
            return "diverged"
        if len(self.scores) == 1:
            return f"{self.score:.4f}"
        return f"{self.score:.4f} ± {statistics.stdev(self.scores):.4f}"


def best_first(results: Iterable[Result]) -> list[Result]:
    """The results by score; of those of the same values the one after most epochs.

    Hyperband trains some further, and other searches may draw values twice.
    """
    found: dict[str, Result] = {}
    for result in results:
        earlier = found.get(result.name)
        if earlier is None or earlier.epochs < result.epochs:
            found[result.name] = result
    return sorted(found.values(), key=lambda result: result.order, reverse=True)


def to_table(title: str, results: Sequence[Result]) -> Table:
    """The results as they are shown."""
    table = Table(title=title)
    keys = results[0].values if results else ()
    for column in (*keys, "epochs", "validation accuracy", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        seconds = f"{result.seconds:.0f}" if result.scores else ""
        cells = *result.values.values(), result.epochs, result, seconds
        table.add_row(*map(str, cells))
    return table


def write_csv(path: Path, results: Sequence[Result], seeds: Sequence[int]) -> None:
    """Write a row for each of the results."""
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        keys = results[0].values if results else ()
        names = [f"seed-{seed}" for seed in seeds]
        writer.writerow([*keys, "epochs", "validation_accuracy", *names, "seconds"])
        for result in results:
            scores = result.scores or ["diverged"] * len(seeds)
            row = [*result.values.values(), result.epochs, result.score]
            writer.writerow([*row, *scores, result.seconds])
