"""Kernels as small devices have them: rounded to few bits, or noisy."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs.unit_axes import is_kernel
from keras_nrs.unit_axes import unit_axes

Array = NDArray[Any]


class Kernels:
    """The weights of a model, of which the kernels can be changed.

    Biases, and scales and offsets of normalization, always stay as they are. A ViT's
    class token and positions are kernels here.

    Args:
        model: A built model, which must not be wrapped.

    Attributes:
        weights: Arrays of all trainable weights.
    """

    def __init__(self, model: keras.Model) -> None:
        variables = model.trainable_variables
        self.weights = [ops.convert_to_numpy(v).astype("float32") for v in variables]
        self._is_kernel = list(map(is_kernel, variables))
        self._units = [
            tuple(i for i in range(len(v.shape)) if i not in axes)
            for v, axes in zip(variables, unit_axes(model), strict=True)
        ]

    def rounded(self, bits: int, *, per_filter: bool) -> list[Array]:
        """The weights, with each kernel rounded to nearest on a symmetric grid.

        The grid has `2**bits - 1` points (the three of 2 bits are -m, 0, m), and ends
        at the largest absolute value m, as in Keras's `AbsMaxQuantizer`.

        Args:
            bits: Bits of a weight, >= 2.
            per_filter: Whether each filter has its own m, or each kernel one.
        """
        levels = 2 ** (bits - 1) - 1

        def rounded(w: Array, unit: tuple[int, ...]) -> Array:
            largest = np.abs(w).max(axis=unit if per_filter else None, keepdims=True)
            step = np.where(largest > 0, largest / levels, 1)
            return np.round(w / step) * step

        return self._changed(rounded)

    def noisy(
        self, share: float, rng: np.random.Generator, *, per_filter: bool
    ) -> list[Array]:
        """The weights, with Gaussian noise added to each kernel.

        Args:
            share: Size of the noise.
            rng: Random numbers.
            per_filter: Whether the noise of each filter has the norm `share` times
                that of the filter, or each weight's has the deviation `share` times
                the kernel's largest absolute value, as analog hardware has it.
        """

        def noisy(w: Array, unit: tuple[int, ...]) -> Array:
            noise = rng.standard_normal(w.shape, "float32")
            if not per_filter:
                return w + share * np.abs(w).max() * noise
            return w + share * noise * (_norms(w, unit) / _norms(noise, unit))

        return self._changed(noisy)

    def _changed(self, change: Any) -> list[Array]:
        return [
            change(w, unit).astype("float32") if is_kernel else w
            for w, unit, is_kernel in zip(
                self.weights, self._units, self._is_kernel, strict=True
            )
        ]


def _norms(w: Array, unit: tuple[int, ...]) -> Array:
    return np.sqrt(np.sum(np.square(w), axis=unit, keepdims=True))


def quantized(model: keras.Model, mode: str) -> tuple[keras.Model, float]:
    """A copy that Keras has quantized, where its layers take that.

    In Keras 3.15 `Dense`, `EinsumDense`, `Embedding` and `ReversibleEmbedding` do,
    so those of attention, and convolutions do not.

    Args:
        model: A built functional or Sequential model.
        mode: `"int8"` or `"int4"`.

    Returns:
        The copy, and the share of the trainable weights that are quantized.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    total = sum(_sizes(copy.trainable_variables))
    plain = keras.layers.Layer.quantize
    copy.quantize(mode, filters=lambda layer: type(layer).quantize is not plain)
    return copy, 1 - sum(_sizes(copy.trainable_variables)) / total


def _sizes(variables: Sequence[Any]) -> list[int]:
    return [int(np.prod(v.shape)) for v in variables]
