"""Student's t-test of paired differences."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from keras_nrs.experiments.t_test import mean_width
from keras_nrs.experiments.t_test import t_test
from keras_nrs.experiments.t_test import with_interval

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_the_interval_is_that_of_the_t_distribution() -> None:
    test = t_test(np.array([1.0, 2.0, 3.0]))
    assert (test.n, test.mean) == (3, 2)
    # The deviation is 1. With two degrees of freedom the 97.5 % quantile is 4.3027.
    assert test.error == pytest.approx(1 / np.sqrt(3))
    assert test.width == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    # The distribution function is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * np.sqrt(3)
    assert test.p == pytest.approx(1 - t / np.sqrt(2 + t**2))


def test_equal_differences() -> None:
    assert t_test(np.zeros(3)) == (3, 0, 0, 0, 1)
    # Equal up to the rounding of float32: the t-test would say p < 1e-5.
    rounded = np.array([0.91, 0.93], "f4") - np.array([0.9, 0.92], "f4")
    assert np.ptp(rounded) > 0
    for differences in (np.ones(2), np.ones(3), rounded, 100 * rounded):
        _, mean, *others = t_test(differences.astype(float))
        assert mean == pytest.approx(differences[0], rel=1e-5)
        assert np.isnan(others).all()


def test_a_single_difference_has_no_interval() -> None:
    n, mean, *others = t_test(np.array([2.0]))
    assert (n, mean) == (1, 2)
    assert np.isnan(others).all()


def as_rows(*cells: NDArray[Any]) -> pd.DataFrame:
    return pd.DataFrame([t_test(cell)._asdict() for cell in cells])


def test_the_mean_of_means_has_the_degrees_of_freedom_of_all() -> None:
    # Three cells of three differences, each with a deviation of 1: 6 degrees of
    # freedom, whose 97.5 % quantile is 2.4469.
    cell = np.array([1.0, 2.0, 3.0])
    assert mean_width(as_rows(cell, cell + 1, cell)) == pytest.approx(2.4469 / 3, 1e-4)
    # One cell: the interval of its own test.
    assert mean_width(as_rows(cell)) == pytest.approx(t_test(cell).width)
    # A cell without variation adds none; one with an unknown error leaves all unknown.
    width = mean_width(as_rows(cell, np.zeros(3)))
    assert width == pytest.approx(t_test(cell).width / 2)
    assert np.isnan(mean_width(as_rows(cell, np.ones(1))))
    assert mean_width(as_rows(np.zeros(3), np.zeros(3))) == 0


@pytest.mark.parametrize(("num_cells", "num_seeds"), [(2, 3), (4, 2)])
def test_95_percent_intervals_of_means_hold_in_95_percent(
    num_cells: int, num_seeds: int
) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cells = rng.normal(size=(num_cells, num_seeds)) * rng.lognormal(
            sigma=0.7, size=(num_cells, 1)
        )
        covered += abs(cells.mean()) <= mean_width(as_rows(*cells))
    # The normal quantile covers 86 and 84 %. The standard error here is 1.1 %.
    assert 0.92 < covered / 400 < 0.99


def test_an_unknown_interval_is_left_out() -> None:
    assert with_interval(1.0, 0.5) == "+1.00 ± 0.50"
    assert with_interval(-1.0, float("nan"), 1) == "-1.0"
