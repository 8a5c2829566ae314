"""A linear classifier, and data and perturbations that are not finite with it."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers
from keras import ops

from keras_nrs.divergences import Divergence
from keras_nrs.perturbations import Perturbation

TERMS = ("loss", "perturbed_loss", "model_divergence")
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def normal_data(num: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(num, 4)).astype("float32"), rng.integers(0, 3, num)


def linear_classifier(
    activation: str | None = None, *, loss: Any = LOGITS
) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation)])
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def infinite_at(step: int, batch_size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Data of four batches, one of which has an infinite input."""
    x, y = normal_data()
    x[step * batch_size] = np.inf
    return x, y


class Scaled(Perturbation):
    """delta is a multiple of the pattern 1, -1, 1, ..."""

    def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> list[Any]:
        signs = [np.where(np.arange(np.prod(w.shape)) % 2, -1.0, 1.0) for w in weights]
        return [
            eps * ops.convert_to_tensor(s.reshape(w.shape).astype("float32"))
            for s, w in zip(signs, weights, strict=True)
        ]


class Infinite(Divergence):
    """Nothing else of the objective is."""

    def call(self, outputs: Any, perturbed_outputs: Any) -> Any:
        return np.inf * (1.0 + ops.sum(ops.square(outputs), axis=-1))
