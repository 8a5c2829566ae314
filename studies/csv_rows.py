"""CSV files of rows that are dicts."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_nrs._files import atomic_write

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, with numbers as int or float and without empty values."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: _parse(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file atomically, with a column for each name in any row."""
    names = dict.fromkeys(name for row in rows for name in row)
    with (
        atomic_write(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _parse(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
