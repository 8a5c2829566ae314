"""Errors for bad arguments, raised before any computation."""

import math
from collections.abc import Iterable
from numbers import Integral
from numbers import Real
from typing import Any

import numpy as np

# Seeds and counters have 32 bits on all backends.
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = float(np.finfo("float32").max)


def check_nonnegative(name: str, value: Any) -> float:
    """A number or scalar tensor as a float >= 0, or an error naming the argument.

    The float is in the range of float32, in which most numbers are computed.
    """
    if tuple(getattr(value, "shape", ("no tensor",))) == ():
        import keras  # Not above: commands check settings before they import it.

        value = keras.ops.convert_to_numpy(value).item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} of type "
            f"{type(value).__name__}. Pass a finite number >= 0."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"`{name}` must be finite and >= 0. Received: {name}={value!r}."
        )
    if number > _LARGEST_FLOAT:
        raise ValueError(
            f"`{name}` must be at most {_LARGEST_FLOAT:.3g}, the largest number in "
            f"float32. Received: {name}={value!r}."
        )
    return number


def check_number(name: str, value: Any) -> float:
    """`value` as a float, which may be NaN or infinite, or an error naming it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    return float(value)


def check_share(name: str, value: Any) -> float:
    """`value` as a float in [0, 1], or an error that names the argument."""
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(
            f"`{name}` must be a share from 0 to 1, not a percentage. Received: "
            f"{name}={value!r}."
        )
    return number


def check_scalar(name: str, value: Any) -> Any:
    """A number >= 0 as a float, or a scalar tensor, which may have no value yet."""
    is_scalar = tuple(getattr(value, "shape", ("no tensor",))) == ()
    if is_scalar and not isinstance(value, Real | np.ndarray):
        return value
    return check_nonnegative(name, value)


def check_positive(name: str, value: Any) -> float:
    """`value` as a float above zero, or an error that names the argument."""
    number = check_nonnegative(name, value)
    if number == 0:
        raise ValueError(f"`{name}` must be > 0. Received: {name}={value!r}.")
    return number


def check_fraction(name: str, value: Any) -> float:
    """`value` as a float in (0, 1], or an error that names the argument."""
    number = check_positive(name, value)
    if number > 1:
        raise ValueError(f"`{name}` must be > 0 and <= 1. Received: {name}={value!r}.")
    return number


def check_rate(name: str, value: Any) -> float:
    """`value` as a float in [0, 1), or an error that names the argument."""
    number = check_nonnegative(name, value)
    if number >= 1:
        raise ValueError(f"`{name}` must be >= 0 and < 1. Received: {name}={value!r}.")
    return number


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int in a range, or an error that names the argument."""
    allowed = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} of type "
            f"{type(value).__name__}. Pass an integer {allowed}."
        )
    number, largest = int(value), _LARGEST_INT if maximum is None else maximum
    if number > largest:
        allowed = f"from {minimum} to {largest}"
    if not minimum <= number <= largest:
        raise ValueError(
            f"`{name}` must be an integer {allowed}. Received: {name}={value!r}."
        )
    return number


def check_bool(name: str, value: Any) -> bool:
    """`value` if it is True or False, or an error that names the argument."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    return value


def check_seed(name: str, value: Any) -> int:
    """`value` if it is a seed on every backend, or an error that names the argument."""
    return check_int(name, value, minimum=0, maximum=_LARGEST_INT)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`, or an error that lists them."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}."
        )
    return value
