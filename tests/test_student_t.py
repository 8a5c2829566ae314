"""Student's t distribution with whole degrees of freedom."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from keras_nrs._student_t import mean_and_error
from keras_nrs._student_t import mean_and_width
from keras_nrs._student_t import quantile

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_closed_forms() -> None:
    """P(|T| < t) is 2 / pi * arctan(t), and t / sqrt(2 + t^2)."""
    assert quantile(0.5, 1) == pytest.approx(1, rel=1e-12)
    assert quantile(0.95, 1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    for t in (0.1, 1.0, 10.0):
        assert quantile(t / math.sqrt(2 + t**2), 2) == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("freedom", [*range(1, 12), 29, 100, 999])
@pytest.mark.parametrize("probability", [0.0, 0.3, 0.95, 0.999])
def test_quantiles_are_those_of_scipy(probability: float, freedom: int) -> None:
    expected = student_t.ppf((1 + probability) / 2, freedom)
    assert quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_interval_of_a_mean() -> None:
    # The deviation is 1. With two degrees of freedom the 97.5 % quantile is 4.3027.
    mean, width = mean_and_width(np.array([1.0, 2.0, 3.0]))
    assert (mean, width) == (2, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert mean_and_error(np.array([1.0, 2.0, 3.0]))[1] == pytest.approx(3**-0.5)


def test_differences_that_do_not_show_how_much_they_vary() -> None:
    for values in ([2.0], [2.0, 2.0], [2.0, 2.0 + 1e-7]):
        mean, width = mean_and_width(np.array(values))
        assert mean == pytest.approx(2)
        assert math.isnan(width)
    assert mean_and_width(np.zeros(3)) == (0, 0)
