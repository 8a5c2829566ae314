"""Arrays of NumPy and tensors of the backend."""

from typing import Any

import numpy as np
from keras import ops

# Of float32: the distance from 1 to the next number, and half of it.
ROUNDING = 2.0**-23
ULP = 2.0**-24


def tensor(array: Any, dtype: str = "float32") -> Any:
    return ops.convert_to_tensor(array, dtype=dtype)


def to_numpy(value: Any) -> np.ndarray:
    return ops.convert_to_numpy(value).astype("float64")


def copied(weights: np.ndarray | None) -> np.ndarray | None:
    """On torch Keras multiplies sample weights by the mask in place."""
    return None if weights is None else weights.copy()
