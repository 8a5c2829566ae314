"""Perturbations whose delta is known."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_nrs


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
