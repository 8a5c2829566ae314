"""Student's t-test of paired differences."""

import numpy as np
import pytest

from keras_nrs.experiments.t_test import t_test

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
    assert t_test(np.ones(3)) == (3, 1, 0, 0, 0)


def test_a_single_difference_has_no_interval() -> None:
    n, mean, *others = t_test(np.array([2.0]))
    assert (n, mean) == (1, 2)
    assert np.isnan(others).all()
