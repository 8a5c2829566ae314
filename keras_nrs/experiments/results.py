"""Finished runs, from folders and CSV files, as a table with a row for each run."""

import csv
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_number
from keras_nrs._checks import check_share
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs.experiments.recipes import VALUES_OF_OLD_FILES
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipe_of

# The columns that name a cell of a table. The cell compares arms.
CELL = ["dataset", "network", "augmentation"]
_SETTINGS_OF_SCHEME = {
    "baseline": (),
    "rpr": ("eps", "perturbation", "interval", "normalize"),
    "nrs": ("eps", "alpha", "perturbation", "interval", "normalize"),
    "sam": ("eps", "perturbation", "interval"),
    "asam": ("eps", "perturbation", "interval"),
}
_NOT_SHARED = {*CELL, "scheme", "seeds", "flatness", *_SETTINGS_OF_SCHEME["nrs"]}
_SHARED_SETTINGS = [f.name for f in fields(Recipe) if f.name not in _NOT_SHARED]
SCHEME_LABELS = {
    "baseline": "baseline",
    "rpr": "RPR",
    "nrs": "NRS",
    "sam": "SAM",
    "asam": "ASAM",
}
BASELINE = SCHEME_LABELS["baseline"]
_REQUIRED = [*CELL, "arm", "seed", "test_accuracy"]
_SHARES = {"test_accuracy", "test_top_5_accuracy", "test_calibration_error"}
_NUMBERS = {
    *("test_cross_entropy", "test_loss", "model_divergence"),
    *("last_layer_eigenvalue", "last_layer_kfra_eigenvalue", "eigenvalue"),
    *("seconds_per_step", "peak_memory_mib", "training_seconds"),
}

Row = dict[str, Any]


def read_runs(paths: Iterable[Path], left_out: list[str] | None = None) -> pd.DataFrame:
    """A row for each finished run.

    Args:
        paths: CSV files of runs, and folders. Folders are searched at any depth for
            runs of `keras-nrs train` and for CSV files of runs, which have at least
            the columns `CELL`, `arm`, `seed` and `test_accuracy`. Rows without a test
            accuracy, and the files of reports, are left out.
        left_out: Gets a line for each run that cannot be read, and why, and for each
            training that has not finished. Without it, a run that cannot be read is an
            error.

    Returns:
        The columns `CELL`, `arm`, `seed`, the values of the recipe for runs that have
        one, the measurements, `folder`, and `baseline`: the name of the arm to compare
        with, whose recipe has the same settings. This arm may have no runs.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a given file lacks a column, no finished run is found, or two
            runs have the same cell, arm and seed.
    """
    paths = list(paths)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"`runs` must be folders or CSV files. Received: {str(path)!r}, which "
                "does not exist."
            )
    skipped: list[str] = []
    rows: list[Row] = []
    for place, read in _candidates(paths):
        try:
            rows += [_checked(row) for row in read()]
        except (OSError, KeyError, TypeError, ValueError) as error:
            if left_out is None:
                raise
            problem = f"it lacks {error}" if isinstance(error, KeyError) else error
            skipped.append(f"{place}: {problem}")
    if not rows:
        raise ValueError(
            "`runs` must hold finished runs: a folder of keras-nrs train, or a CSV "
            f"file with the columns {', '.join(_REQUIRED)}. Received: "
            f"{', '.join(map(str, paths))}, without a tested run. {' '.join(skipped)}"
        )
    if left_out is not None:
        left_out += [*skipped, *_unfinished(paths)]
    # Only recipes have a scheme.
    runs = pd.DataFrame(
        (VALUES_OF_OLD_FILES if "scheme" in row else {}) | row for row in rows
    )
    runs["arm"], runs["baseline"] = _arms(runs)
    _check_unique(runs)
    return _sorted(runs)


def _candidates(paths: Iterable[Path]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Names of runs, and functions that read them."""
    for path in paths:
        if not path.is_dir():
            yield from _rows_of_file(path)
            continue
        for summary in sorted(path.rglob("summary.json")):
            yield str(summary.parent), partial(_run_of_folder, summary.parent)
        for file in sorted(path.rglob("*.csv")):
            is_of_report = file.name == "runs.csv" and _is_report(file.parent)
            if not is_of_report and set(_REQUIRED) <= set(_header(file)):
                yield from _rows_of_file(file)


def _unfinished(paths: Iterable[Path]) -> Iterator[str]:
    """A line for each folder of a training without a summary: means lack its seed."""
    for path in paths:
        for recipe in sorted(path.rglob("recipe.json")):
            if recipe.with_name("summary.json").exists():
                continue
            # Trials of a sweep are not tested.
            if b'"test": false' not in recipe.read_bytes():
                yield (
                    f"{recipe.parent}: it has not finished; a training ends without a "
                    "result if its loss is not finite"
                )


def _is_report(folder: Path) -> bool:
    return (folder / "report.html").exists()


def _header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return next(csv.reader(file), [])
    except (OSError, csv.Error):
        return []


def _run_of_folder(folder: Path) -> list[Row]:
    remedy = "Restore it, or delete the folder to train again."
    values = read_json(folder / "summary.json", expect_object, remedy=remedy)
    # Trials of a sweep are not tested.
    if "test_accuracy" not in values:
        return []
    recipe = read_json(folder / "recipe.json", recipe_of, remedy=remedy)
    return [recipe | values | {"folder": str(folder)}]


def _rows_of_file(path: Path) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The rows of a CSV file one by one, or the file if it cannot be read."""
    try:
        runs = _read_csv(path)
    except (OSError, ValueError) as error:
        yield str(path), partial(_fail, error)
        return
    for number, row in enumerate(runs.to_dict("records"), start=2):
        if pd.notna(row["test_accuracy"]):
            found = {str(k): value for k, value in row.items() if pd.notna(value)}
            found["folder"] = str(path)
            yield f"{path}, line {number}", partial(list, [found])


def _fail(error: Exception) -> list[Row]:
    raise error


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        runs = pd.read_csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be in UTF-8. {error}") from error
    missing = [name for name in _REQUIRED if name not in runs]
    if missing:
        raise ValueError(
            f"A file of runs must have the columns {', '.join(_REQUIRED)}. Received: "
            f"{str(path)!r}, without {', '.join(missing)}."
        )
    for name in runs.columns.intersection(["seed", *_SHARES, *_NUMBERS]):
        # A text in one row makes texts of all numbers.
        numbers = pd.to_numeric(runs[name], errors="coerce")
        runs[name] = numbers.astype(object).where(numbers.notna(), runs[name])
    return runs


def _checked(row: Row) -> Row:
    """The row of a run, in which tables can rely on types."""
    texts = {name: str(row[name]).strip() for name in CELL}
    if "scheme" not in row or "arm" in row:
        texts["arm"] = str(row["arm"]).strip()
    for name, text in texts.items():
        if not text:
            raise ValueError(f"`{name}` is empty")
    if "scheme" in row:
        check_choice("scheme", row["scheme"], SCHEME_LABELS)
    is_whole = isinstance(row["seed"], float) and row["seed"].is_integer()
    seed = check_int("seed", int(row["seed"]) if is_whole else row["seed"], 0)
    for name in _SHARES & set(row):
        check_share(name, row[name])
    for name in _NUMBERS & set(row):
        check_number(name, row[name])
    return row | texts | {"seed": seed}


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
    """Sort by cell, "digits-50" before "digits-100"; then as in `SCHEME_LABELS`."""

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
