"""Noise from a hash of each element's index, in a few operations for each element.

A compiler fuses them into one loop, which keeps no random bits in memory. On a CPU
`jax.random.normal` and `tf.random.stateless_normal` take several times as long
(`tests/benchmarks/growth.py`): longer than both passes, for large kernels and small
batches.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

Tensor = Any

# The sum of 4 uniform bytes, standardized, is nearly normal. Twice the sum plus the
# lowest bit is never in the middle: a weight of one element needs noise other than 0.
# This odd polynomial maps its quantiles to normal ones: a least squares fit weighted by
# probability and scaled to variance 1, which `tests/test_noise.py` repeats.
_SUM_MEAN = 1020.5
_SUM_STDDEV = math.sqrt(16 * (256**2 - 1) / 12 + 1.25)
_QUANTILES = (0.958845534, 0.0166706793, -0.00203180708, 0.000317676117)


def _word(value: int) -> Tensor:
    # With the dtype: on JAX with floatx "bfloat16", Keras takes NumPy's integers for
    # floats without it.
    return ops.convert_to_tensor(value, "uint32")


def _shifted(words: Tensor, places: int) -> Tensor:
    return ops.right_shift(words, _word(places))


def _mix_bits(words: Tensor) -> Tensor:
    """The finalizer of MurmurHash3, a bijection: each bit depends on every bit."""
    for places, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = ops.bitwise_xor(words, _shifted(words, places)) * np.uint32(factor)
    return ops.bitwise_xor(words, _shifted(words, 16))


def _indices(shape: tuple[int, ...], rows: Tensor | None) -> Tensor:
    """The index of each element, summed over the axes so that it can be sharded."""
    indices = ops.zeros(shape if rows is None else (1, *shape[1:]), "uint32")
    stride = 1
    for axis, length in reversed(list(enumerate(shape))):
        along_axis = [1] * len(shape)
        along_axis[axis] = -1
        is_given = axis == 0 and rows is not None
        steps = rows if is_given else ops.arange(length, dtype="int32")
        steps = ops.reshape(ops.cast(steps, "uint32"), along_axis)
        indices = indices + steps * np.uint32(stride)
        stride *= length
    return indices


def words(key: Tensor, shape: tuple[int, ...], rows: Tensor | None = None) -> Tensor:
    """Random 32-bit words.

    Args:
        key: Tensor of shape `(2,)` and dtype uint32.
        shape: A shape of less than 2**31 elements.
        rows: Indices along the first axis, of shape `(k,)`, for the words of these rows
            alone. By default all are computed.
    """
    indices = _indices(shape, rows) + key[0]
    return _mix_bits(ops.bitwise_xor(_mix_bits(indices), key[1]))


def normal(words: Tensor, dtype: str) -> Tensor:
    """Standard normal numbers, one from each word.

    They take 2,040 values from -4.86 to 4.86, 0.003 apart around zero, and never zero.
    Their distribution function differs from the normal one by at most 0.0012, and
    their kurtosis is 2.9995.
    """
    mask = _word(0x00FF00FF)
    pairs = ops.bitwise_and(words, mask)
    pairs = pairs + ops.bitwise_and(_shifted(words, 8), mask)
    total = ops.bitwise_and(pairs, _word(0xFFFF))
    total = total + _shifted(pairs, 16)
    total = total + total + ops.bitwise_and(words, _word(1))
    x = (_to_float(total, dtype) - _SUM_MEAN) * (1 / _SUM_STDDEV)
    square = x * x
    factor: Tensor = 0.0
    for coefficient in reversed(_QUANTILES):
        factor = factor * square + coefficient
    return x * factor


def rademacher(words: Tensor, dtype: str) -> Tensor:
    """Signs, -1 or 1 with equal probability, one from each word."""
    return 1 - 2 * _to_float(_shifted(words, 31), dtype)


class WordStream:
    """The draws of a random stream whose numbers are functions of random words."""

    # Whether some rows of a tensor can be drawn without the others.
    draws_rows = True

    def normal(
        self,
        shape: tuple[int, ...],
        dtype: str = "float32",
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Standard normal numbers.

        Args:
            shape: The shape.
            dtype: The dtype.
            rows: As in `words()`.
        """
        return self._from_words(normal, tuple(shape), dtype, rows)

    def rademacher(
        self,
        shape: tuple[int, ...],
        dtype: str = "float32",
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Signs, -1 or 1 with equal probability, as for `normal()`."""
        return self._from_words(rademacher, tuple(shape), dtype, rows)

    def _from_words(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: str,
        rows: Tensor | None,
    ) -> Tensor:
        """A function of the words of the next draw, and of a dtype."""
        raise NotImplementedError


def _to_float(words: Tensor, dtype: str) -> Tensor:
    # Processors convert signed integers faster than unsigned ones.
    return ops.cast(ops.cast(words, "int32"), dtype)
