"""Errors for bad arguments, raised before any computation."""

import math
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from numbers import Real
from typing import Any

import keras
import numpy as np

# Seeds and counters are of 32 bits on all backends.
_LARGEST_INT = 2**31 - 1


def check_nonnegative(name: str, value: Any) -> float:
    """A number or a scalar tensor as a float, or an error that names the argument."""
    if tuple(getattr(value, "shape", ("no tensor",))) == ():
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
    return number


def check_scalar(name: str, value: Any) -> Any:
    """A number >= 0, or a scalar tensor, whose value may not be known yet."""
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


@contextmanager
def naming_labels(y: Any, outputs: Any, sample_weight: Any = None) -> Iterator[None]:
    """A context in which an error of a loss says what labels the loss was given.

    Where they cannot belong to the outputs the error is a `ValueError`, on all
    backends.

    Args:
        y: Labels.
        outputs: Of the model, or `None` if they are not known.
        sample_weight: Weights of the samples, if there are any.
    """
    try:
        yield
    except Exception as error:
        if y is None and outputs is not None:
            raise ValueError(
                "`y` must be labels, which the compiled loss compares with the model's "
                f"outputs of shape {_shapes(outputs)}. Received: y=None."
            ) from error
        text = (
            "`y` must be labels that the loss can compare with the model's outputs: "
            "of the same shape or, if they are indices of classes, without its last "
            "axis; and `sample_weight` must have the first axes of that shape. "
            f"Received: y of shape {_shapes(y)} for outputs of shape "
            f"{_shapes(outputs)}, with sample_weight of shape {_shapes(sample_weight)}."
        )
        if outputs is None or _labels_fit(y, outputs, sample_weight):
            error.add_note(text)
            raise
        raise ValueError(f"{text} The loss could not be computed: {error}") from error


def _shapes(structure: Any) -> Any:
    return keras.tree.map_structure(
        lambda t: None if t is None else tuple(getattr(t, "shape", ())), structure
    )


def _labels_fit(y: Any, outputs: Any, sample_weight: Any) -> bool:
    """Whether there are labels for all outputs, whose shapes a loss may take."""
    if isinstance(y, dict) and isinstance(outputs, dict) and set(y) != set(outputs):
        return False
    labels, tensors = keras.tree.flatten(y), keras.tree.flatten(outputs)
    weights = keras.tree.flatten(sample_weight)
    if len(labels) != len(tensors) or any(label is None for label in labels):
        return False
    return all(
        _is_one_of(label, shape, shape[:-1], (*shape[:-1], 1))
        for label, shape in zip(labels, _shapes(tensors), strict=True)
    ) and all(
        w is None
        or _is_one_of(w, shape[: len(w.shape)], (*shape[: len(w.shape) - 1], 1))
        for w, shape in zip(weights, _shapes(tensors), strict=False)
    )


def _is_one_of(tensor: Any, *shapes: tuple[int | None, ...]) -> bool:
    """Whether a tensor has one of some shapes, of which not all may be known."""
    own = tuple(getattr(tensor, "shape", ()))
    return any(
        len(own) == len(shape)
        and all(
            None in pair or pair[0] == pair[1] for pair in zip(own, shape, strict=True)
        )
        for shape in shapes
    )
