"""Student's t-test of paired differences."""

from typing import Any
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t


class TTest(NamedTuple):
    """What a t-test says about the mean of some differences.

    Attributes:
        n: Number of differences.
        mean: Their mean.
        error: Standard error of the mean; NaN for a single difference.
        width: Half the width of the mean's 95 % confidence interval, likewise.
        p: Two-sided p-value of a mean of 0, likewise.
    """

    n: int
    mean: float
    error: float
    width: float
    p: float


def t_test(differences: NDArray[Any]) -> TTest:
    """Test whether the mean of differences, of shape `(n,)`, is 0."""
    n, mean = len(differences), float(np.mean(differences))
    if n == 1:
        return TTest(n, mean, np.nan, np.nan, np.nan)
    error = float(np.std(differences, ddof=1) / np.sqrt(n))
    width = error * float(student_t.ppf(0.975, n - 1))
    p = 2 * student_t.sf(abs(mean) / error, n - 1) if error else mean == 0
    return TTest(n, mean, error, width, float(p))
