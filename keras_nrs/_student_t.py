"""Student's t distribution with whole degrees of freedom, without SciPy."""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 60


def mean_and_error(differences: NDArray[Any]) -> tuple[float, float]:
    """The mean of differences, of shape `(n,)`, and its standard error.

    The error is NaN for a single difference, and for equal ones that are not 0: they
    do not show how much differences vary.
    """
    n, mean = len(differences), float(np.mean(differences))
    # Rounding of float32, in which measurements are made, is no variation.
    is_constant = np.ptp(differences) <= 1e-4 * abs(mean)
    if n == 1 or (is_constant and mean):
        return mean, math.nan
    return mean, float(np.std(differences, ddof=1) / np.sqrt(n))


def mean_and_width(differences: NDArray[Any]) -> tuple[float, float]:
    """The mean of differences, and half the width of its 95 % confidence interval."""
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return mean, error
    return mean, error * quantile(0.95, len(differences) - 1)


@functools.cache
def quantile(probability: float, freedom: int) -> float:
    """The t for which |T| < t has a probability in [0, 1)."""
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        angle = (low + high) / 2
        if _central_probability(angle, freedom) < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _central_probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) * tan(angle)).

    Reference: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    sine, squared_cosine = math.sin(angle), math.cos(angle) ** 2
    is_odd = freedom % 2
    term, total = math.cos(angle) if is_odd else 1.0, 0.0
    for k in range(2 + is_odd, freedom + 1, 2):
        total += term
        term *= squared_cosine * (k - 1) / k
    return (angle + sine * total) * 2 / math.pi if is_odd else sine * total
