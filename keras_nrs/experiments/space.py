"""The space of a sweep: keys of a recipe, and the values to try."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from typing import NamedTuple

import keras_tuner

from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import literal
from keras_nrs.experiments.recipes import split_setting

_TYPES = {field.name: field.type for field in dataclasses.fields(Recipe)}
_INTEGERS = (int, int | None)
_NUMBERS = (*_INTEGERS, float, float | None)
# Trials with different values of these keys could not be compared, or would be equal.
_FIXED = ("dataset", "flatness", "seeds", "source", "validation_percent")

Values = dict[str, Any]


class Range(NamedTuple):
    """Numbers from `low` to `high`, drawn uniformly, or log-uniformly with `log`."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Sequence[Any] | Range]


def parse_space(entries: Iterable[str]) -> Space:
    """The space that strings `key=value,value` and `key=low:high[:log]` describe.

    Raises:
        ValueError: if a key is unknown or given twice, or a range has another form.

    Example:
        >>> from keras_nrs.experiments.space import parse_space
        >>> parse_space(["perturbation=ball,relative", "eps=0.01:1:log"])
        {'perturbation': ['ball', 'relative'], 'eps': Range(low=0.01, high=1, log=True)}
    """
    space: dict[str, Sequence[Any] | Range] = {}
    for entry in entries:
        key, text = split_setting(entry)
        if key in space:
            raise ValueError(
                f"{key!r} is varied twice. Received: {entry!r} as well. Give each key "
                "once, with all of its values."
            )
        space[key] = (
            _parse_range(entry) if ":" in text else list(map(literal, text.split(",")))
        )
    return space


def _parse_range(entry: str) -> Range:
    low, high, *rest = map(literal, entry.partition("=")[2].split(":"))
    is_numeric = isinstance(low, int | float) and isinstance(high, int | float)
    if not is_numeric or rest not in ([], ["log"]):
        raise ValueError(
            "A range must be LOW:HIGH or LOW:HIGH:log with two numbers. "
            f"Received: {entry!r}."
        )
    return Range(low, high, bool(rest))


def describe(space: Space) -> dict[str, str]:
    """The values of each key, as text in the form of `--vary`."""
    return {
        key: f"{values.low}:{values.high}" + (":log" if values.log else "")
        if isinstance(values, Range)
        else ",".join(map(str, values))
        for key, values in space.items()
    }


def check_space(space: Space, recipe: Recipe, search: str) -> list[Recipe]:
    """Check a space for a recipe and a search.

    Returns:
        Copies of the recipe, one for each listed value and each end of a range.

    Raises:
        TypeError, ValueError: if a key cannot be varied, the recipe refuses a value,
            or the search cannot use the space.
    """
    if not space:
        raise ValueError("The space must vary at least one key. Received: {}.")
    changed = []
    for key, text in describe(space).items():
        values, entry = space[key], f"{key}={text}"
        split_setting(entry)
        if key in _FIXED or (key == "epochs" and search == "hyperband"):
            raise ValueError(
                f"{key!r} cannot be varied with search={search!r}. Received: "
                f"'{entry}'. Set a single value with --set."
            )
        checked = (
            _check_range(entry, values)
            if isinstance(values, Range)
            else _check_list(entry, values)
        )
        changed += [replace(recipe, **{key: value}) for value in checked]
    ranges = [key for key, values in space.items() if isinstance(values, Range)]
    if search == "grid" and ranges:
        raise ValueError(
            "A grid needs a list of values for each key. Received a range: "
            f"'{ranges[0]}={describe(space)[ranges[0]]}'. Use --search random, "
            "bayesian or hyperband, or list values: 'KEY=V1,V2'."
        )
    if search == "hyperband" and all(_TYPES[key] in _INTEGERS for key in ranges):
        # Out of new values, KerasTuner's Hyperband ends before it trains a trial fully.
        raise ValueError(
            "Hyperband needs a range of real numbers: it draws more trials than lists "
            f"have values. Received: {describe(space)}. Give a range, such as "
            "'eps=0.05:0.5', or use --search grid."
        )
    return changed


def _check_range(entry: str, values: Range) -> list[Any]:
    if _TYPES[entry.partition("=")[0]] not in _NUMBERS:
        raise ValueError(
            f"Only numbers can have a range. Received: {entry!r}. List the values."
        )
    if not values.low < values.high or (values.log and values.low <= 0):
        raise ValueError(
            "A range must be from a low to a higher number, and above 0 with 'log'. "
            f"Received: {entry!r}."
        )
    return [values.low, values.high]


def _check_list(entry: str, values: Sequence[Any]) -> list[Any]:
    if isinstance(values, str) or not values:
        raise TypeError(
            "The values of a key must be a list that is not empty, or a Range. "
            f"Received: {entry!r}."
        )
    values = list(values)
    if any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"A value is listed twice. Received: {entry!r}.")
    return values


def to_hyperparameters(space: Space) -> keras_tuner.HyperParameters:
    """The space in KerasTuner's form.

    Listed values become texts: they may have several types, and texts do not change in
    files and between processes.
    """
    hyperparameters = keras_tuner.HyperParameters()
    for key, values in space.items():
        if not isinstance(values, Range):
            hyperparameters.Choice(key, list(map(str, values)))
            continue
        is_integer = _TYPES[key] in _INTEGERS
        kind = hyperparameters.Int if is_integer else hyperparameters.Float
        sampling = "log" if values.log else "linear"
        kind(key, values.low, values.high, sampling=sampling)
    return hyperparameters


def to_values(space: Space, hyperparameters: keras_tuner.HyperParameters) -> Values:
    """The values of a trial, in the order of the space; floats have 4 digits."""
    return {key: _to_value(space[key], hyperparameters.values[key]) for key in space}


def _to_value(values: Sequence[Any] | Range, drawn: Any) -> Any:
    if not isinstance(values, Range):
        return {str(value): value for value in values}[drawn]
    return float(f"{drawn:.4g}") if isinstance(drawn, float) else drawn
