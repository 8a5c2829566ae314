"""Perturbations whose delta is known, and what tests of the others share."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_nrs
from keras_nrs import perturbations
from tests.support.arrays import ULP

# Those with a `radius`, and all that are random.
WITH_RADIUS = (
    perturbations.Ball,
    perturbations.RelativeBall,
    perturbations.LayerwiseBall,
    perturbations.FilterwiseBall,
    perturbations.ReleasedCode,
)
RANDOM = (*WITH_RADIUS, perturbations.ElementwiseNoise)
SHAPES = ((3, 2), (4,), (3, 2))
SIZE = 16
# Rounding of a norm of SIZE float32 numbers, and the margin that Ball leaves.
NORM_RTOL = (SIZE + 8) * ULP + 2.0**-20


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class FixedPerturbation(keras_nrs.perturbations.Perturbation):
    """The same delta at every step: `eps` times a NumPy pattern."""

    def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> list[Any]:
        patterns = [
            np.cos(np.arange(np.prod(w.shape)) + i).reshape(w.shape)
            for i, w in enumerate(weights)
        ]
        dtypes = [keras.backend.standardize_dtype(w.dtype) for w in weights]
        return [
            eps * keras.ops.convert_to_tensor(p.astype(d))
            for p, d in zip(patterns, dtypes, strict=True)
        ]


def to_numpy(tensors: Sequence[Any]) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(t).astype("float64") for t in tensors]


def norm(tensors: Sequence[Any]) -> float:
    return math.sqrt(sum(float(np.sum(t**2)) for t in to_numpy(tensors)))


def weights_like(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32"
) -> list[Any]:
    rng = np.random.default_rng(1)
    return [
        keras.ops.convert_to_tensor(rng.normal(size=s), dtype=dtype) for s in shapes
    ]
