"""Random tensors on TensorFlow."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from keras_nrs import noise

Tensor = Any


def _noise(
    function: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], dtype: str
) -> Tensor:
    words = noise.words(tf.bitcast(tf.cast(key, "int32"), "uint32"), shape)
    return function(words, dtype)


# As single operations it would pass over the memory many times.
_compiled_noise = tf.function(_noise, jit_compile=True, autograph=False)


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = tf.cast(key, "int64")
        self._draws = 0

    # The noise of all weights is drawn at once.
    draws_whole = True
    cuts_whole = True

    def fold_in(self, index: Any) -> "RandomStream":
        """A stream independent of this one and of the streams of other indices."""
        # Negative, so that it never equals a draw's.
        index = -1 - tf.cast(index, "int64")
        return RandomStream(tf.random.experimental.stateless_fold_in(self._key, index))

    def _next_key(self) -> Tensor:
        self._draws += 1
        # With a Python int it would return a key of 32 bits instead of 64.
        draws = tf.constant(self._draws, "int64")
        return tf.random.experimental.stateless_fold_in(self._key, draws)

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Standard normal numbers."""
        return _compiled_noise(noise.normal, self._next_key(), tuple(shape), dtype)

    def rademacher(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Signs, -1 or 1 with equal probability."""
        return _compiled_noise(noise.rademacher, self._next_key(), tuple(shape), dtype)

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        return tf.random.stateless_uniform(shape, self._next_key(), dtype=dtype)


def restored_random_state(like: Tensor) -> AbstractContextManager[None]:
    """A context that changes nothing: layers of Keras use no global generator here."""
    return nullcontext()
