"""Comparisons of weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np


def numpy_values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_equal(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    """Bit-identical lists of arrays."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_goes_on_alike(model: Any, path: Path, *data: Any) -> Any:
    """A model and its saved copy take the same step. Returns the copy."""
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert model.train_on_batch(*data) == loaded.train_on_batch(*data)
    assert_equal(numpy_values(model.variables), numpy_values(loaded.variables))
    return loaded


def relative_error(matrix: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(matrix - expected) / np.linalg.norm(expected))
