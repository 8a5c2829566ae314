"""Student's t-test of paired differences."""

from typing import Any
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from keras_nrs._student_t import mean_and_error


class TTest(NamedTuple):
    """What a t-test says about the mean of some differences.

    Attributes:
        n: Number of differences.
        mean: Their mean.
        error: Standard error of the mean; NaN for a single difference, and for equal
            ones that are not 0: they do not show how much differences vary.
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
    n = len(differences)
    mean, error = mean_and_error(differences)
    width = error * float(student_t.ppf(0.975, n - 1))
    p = 2 * student_t.sf(abs(mean) / error, n - 1) if error else 1.0
    return TTest(n, mean, error, width, float(p))


def mean_width(tests: Any) -> float:
    """Half the width of the 95 % confidence interval of the mean of means.

    Welch's interval: the means have errors of different sizes.

    Args:
        tests: A `pandas.DataFrame` with a row for each mean, and a column for each
            attribute of a `TTest`.

    Returns:
        The width; NaN if that of a mean is NaN.
    """
    variances = tests["error"] ** 2
    total = variances.sum(skipna=False)
    if not total:
        return 0.0
    freedom = total**2 / (variances**2 / (tests["n"] - 1)).sum(skipna=False)
    return float(student_t.ppf(0.975, freedom) * np.sqrt(total) / len(tests))


def with_interval(mean: float, width: float, digits: int = 2) -> str:
    """A mean and half its 95 % interval, which NaN leaves out."""
    text = f"{mean:+.{digits}f}"
    return text if np.isnan(width) else f"{text} ± {width:.{digits}f}"
