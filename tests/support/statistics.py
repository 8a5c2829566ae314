"""Statistical tests, and the level at which they fail."""

import math
from typing import Any

import keras
import numpy as np
import scipy.stats
from keras import ops

LEVEL = 1e-4


def key(seed: int, step: int = 0) -> Any:
    """What a `SeedGenerator(seed)` gives at a step."""
    state = keras.random.SeedGenerator(seed).state
    return ops.convert_to_tensor([seed, step], dtype=state.dtype)


def max_correlation_p_value(correlations: np.ndarray, num_samples: int) -> float:
    """p-value of the largest of many correlations of independent samples.

    Each is about normal with variance 1 / num_samples; Bonferroni's bound.
    """
    largest = np.max(np.abs(correlations))
    p_value = 2 * scipy.stats.norm.sf(largest * math.sqrt(num_samples))
    return float(min(1.0, correlations.size * p_value))


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), k=1)]
