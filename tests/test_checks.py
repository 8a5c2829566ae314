"""Errors for bad arguments say what was received and what was expected."""

import fractions
import math
from typing import Any

import numpy as np
import pytest

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_fraction
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_positive

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize(
    "value", [0, 0.5, 3, np.float32(0.5), np.int64(3), fractions.Fraction(1, 2)]
)
def test_nonnegative_numbers(value: Any) -> None:
    number = check_nonnegative("eps", value)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize("value", [None, "1", True, 1j, [1.0], np.ones(1)])
@pytest.mark.parametrize("check", [check_nonnegative, check_positive])
def test_no_numbers(check: Any, value: Any) -> None:
    with pytest.raises(
        TypeError, match=r"`eps` must be a number\. Received: eps=.*>= 0"
    ):
        check("eps", value)


@pytest.mark.parametrize("value", [1e-3, np.float32(0.5), 1])
def test_fractions(value: Any) -> None:
    assert check_fraction("fraction", value) == value


@pytest.mark.parametrize("value", [0, 1.001])
def test_no_fractions(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be > 0.*fraction="):
        check_fraction("fraction", value)


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, np.float32("nan")])
@pytest.mark.parametrize("check", [check_nonnegative, check_positive])
def test_negative_or_infinite_numbers(check: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"`eps` must be finite and >= 0\. .*eps="):
        check("eps", value)


@pytest.mark.parametrize("value", [3.5e38, 1e39, 10**200])
@pytest.mark.parametrize("check", [check_nonnegative, check_positive])
def test_numbers_that_float32_does_not_hold(check: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"`eps` must be at most 3\.4e\+38.*eps="):
        check("eps", value)
    assert check("eps", 3.4e38) == 3.4e38


def test_positive_numbers() -> None:
    assert check_positive("stddev", 2) == 2.0
    with pytest.raises(ValueError, match=r"`stddev` must be > 0\. .*stddev=0"):
        check_positive("stddev", 0)


@pytest.mark.parametrize("value", [2, 7, np.int64(2), np.uint8(9)])
def test_integers(value: Any) -> None:
    number = check_int("interval", value, 2)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize("value", [2.0, "2", None, True])
def test_no_integers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"`interval` must be an integer.*integer >= 1"):
        check_int("interval", value, 1)


def test_too_small_an_integer() -> None:
    with pytest.raises(ValueError, match=r"integer >= 1\. Received: interval=0"):
        check_int("interval", 0, 1)


def test_choices() -> None:
    assert check_choice("scheme", "nrs", ("nrs", "rpr")) == "nrs"
    assert check_choice("scheme", "rpr", iter(["nrs", "rpr"])) == "rpr"


@pytest.mark.parametrize("value", ["NRS", None, ["nrs"], 0])
def test_no_choice(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`scheme`.*\['nrs', 'rpr'\].*scheme="):
        check_choice("scheme", value, iter(["nrs", "rpr"]))
