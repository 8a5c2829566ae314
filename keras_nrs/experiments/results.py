"""Finished runs, from folders and CSV files, as a table with a row for each run."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from keras_nrs.experiments.recipes import VALUES_OF_OLD_FILES
from keras_nrs.experiments.recipes import Recipe

# The columns that name a cell of a table. The cell compares arms.
CELL = ["dataset", "network", "augmentation"]
_SETTINGS_OF_SCHEME = {
    "baseline": (),
    "rpr": ("eps", "perturbation", "interval", "normalize"),
    "nrs": ("eps", "alpha", "perturbation", "interval", "normalize"),
}
_NOT_SHARED = {*CELL, "scheme", "seeds", "flatness", *_SETTINGS_OF_SCHEME["nrs"]}
_SHARED_SETTINGS = [f.name for f in fields(Recipe) if f.name not in _NOT_SHARED]
SCHEME_LABELS = {"baseline": "baseline", "rpr": "RPR", "nrs": "NRS"}
BASELINE = SCHEME_LABELS["baseline"]
_REQUIRED = [*CELL, "arm", "seed", "test_accuracy"]


def read_runs(paths: Iterable[Path]) -> pd.DataFrame:
    """A row for each finished run.

    Args:
        paths: CSV files of runs, and folders. Folders are searched at any depth for
            runs of `keras-nrs train` and for CSV files of runs, which have at least
            the columns `CELL`, `arm`, `seed` and `test_accuracy`. Rows without a test
            accuracy are left out.

    Returns:
        The columns `CELL`, `arm`, `seed`, the values of the recipe for runs that have
        one, the measurements, `folder`, and `baseline`: the name of the arm to compare
        with, whose recipe has the same settings. This arm may have no runs.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a given file lacks a column, no finished run is found, or two
            runs have the same cell, arm and seed.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"`runs` must be folders or CSV files. Received: {str(path)!r}, which "
                "does not exist."
            )
        rows += _rows_of_folder(path) if path.is_dir() else _rows_of_file(path)
    if not rows:
        raise ValueError(
            "`runs` must hold finished runs: a folder of keras-nrs train, or a CSV "
            f"file with the columns {', '.join(_REQUIRED)}. Received: "
            f"{', '.join(map(str, paths))}, without a tested run."
        )
    # Only recipes have a scheme.
    runs = pd.DataFrame(
        (VALUES_OF_OLD_FILES if "scheme" in row else {}) | row for row in rows
    )
    runs["arm"], runs["baseline"] = _arms(runs)
    _check_unique(runs)
    return _sorted(runs)


def _rows_of_folder(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for summary in sorted(folder.rglob("summary.json")):
        values = json.loads(summary.read_text(encoding="utf-8"))
        # Trials of a sweep are not tested.
        if "test_accuracy" in values:
            recipe = json.loads((summary.parent / "recipe.json").read_text("utf-8"))
            rows.append(recipe | values | {"folder": str(summary.parent)})
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if set(_REQUIRED) <= set(header):
            rows += _rows_of_file(path)
    return rows


def _rows_of_file(path: Path) -> list[dict[str, Any]]:
    runs = pd.read_csv(path)
    missing = [name for name in _REQUIRED if name not in runs]
    if missing:
        raise ValueError(
            f"A file of runs must have the columns {', '.join(_REQUIRED)}. Received: "
            f"{str(path)!r}, without {', '.join(missing)}."
        )
    tested = runs[runs["test_accuracy"].notna()]
    return [
        {name: value for name, value in row.items() if pd.notna(value)}
        | {"folder": str(path)}
        for row in tested.to_dict("records")
    ]


def _arms(runs: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """The arm of each run, and the name of the baseline to compare it with.

    An arm is as given, or the recipe's scheme and varied settings. Settings of the
    scheme vary between its runs in the cell, other settings between all of them.
    """
    arms = runs["arm"].copy() if "arm" in runs else pd.Series(pd.NA, runs.index)
    baselines = pd.Series(BASELINE, runs.index)
    if "scheme" not in runs:
        return arms, baselines
    of_recipes = runs[runs["scheme"].isin(SCHEME_LABELS)]
    for _, cell in of_recipes.groupby(CELL):
        shared = _varied(cell, _SHARED_SETTINGS)
        for scheme, of_scheme in cell.groupby("scheme"):
            own = _varied(of_scheme, _SETTINGS_OF_SCHEME[str(scheme)])
            names = SCHEME_LABELS[str(scheme)] + shared[own.index] + own
            arms = arms.fillna(names)
        is_baseline = cell["scheme"] == "baseline"
        given = arms[cell.index][is_baseline]
        found = dict(zip(shared[is_baseline], given, strict=True))
        baselines[cell.index] = [found.get(s, BASELINE + s) for s in shared]
    return arms, baselines


def _varied(runs: pd.DataFrame, settings: Iterable[str]) -> pd.Series:
    """A text ", setting=value" for each run, of the settings that vary."""
    texts = pd.Series("", runs.index)
    for name in settings:
        values = runs[name].map(_setting_text) if name in runs else texts
        if values.nunique() > 1:
            texts = texts + f", {name}=" + values
    return texts


def _setting_text(value: Any) -> str:
    # Files of runs have no `None`, and whole numbers as floats.
    if pd.isna(value):
        return "None"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _sorted(runs: pd.DataFrame) -> pd.DataFrame:
    """Sort by cell, "digits-50" before "digits-100"; then baseline, RPR, NRS, rest."""

    def key(column: pd.Series) -> pd.Series:
        if column.name == "arm":
            ranks = {label: i for i, label in enumerate(SCHEME_LABELS.values())}
            return column.str.partition(",")[0].map(ranks).fillna(len(ranks))
        return column.map(lambda text: re.sub(r"\d+", lambda n: n[0].zfill(9), text))

    by = [*CELL, "arm"]
    return runs.sort_values(by, key=key, kind="stable").reset_index(drop=True)


def _check_unique(runs: pd.DataFrame) -> None:
    key = [*CELL, "arm", "seed"]
    repeated = runs[runs.duplicated(key, keep=False)]
    if len(repeated):
        first = repeated.iloc[0]
        same = repeated[(repeated[key] == first[key]).all(axis=1)]
        raise ValueError(
            "`runs` must not hold a run twice. Received: "
            f"{', '.join(f'{name}={first[name]}' for name in key)} in "
            f"{' and '.join(same['folder'])}. Leave one out."
        )
