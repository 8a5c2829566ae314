"""Random tensors on JAX."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import jax
import keras

from keras_nrs import noise

Tensor = Any


class RandomStream(noise.WordStream):
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = jax.random.wrap_key_data(
            jax.numpy.asarray(key, "uint32"), impl="threefry2x32"
        )
        self._draws = 0

    # Whether to draw at once what is used in parts, each more than once. XLA's CPU
    # compiler would draw a part anew for each use.
    cuts_whole = False

    def fold_in(self, index: Any) -> "RandomStream":
        """A stream independent of this one and of the streams of other indices."""
        return RandomStream(jax.random.key_data(jax.random.fold_in(self._key, index)))

    @property
    def draws_whole(self) -> bool:
        """Whether to draw the noise of all weights at once: it compiles faster.

        Not where each device holds a shard of the weights: it would hold all noise.
        """
        return not isinstance(
            keras.distribution.distribution(), keras.distribution.ModelParallel
        )

    def _next_key(self) -> Tensor:
        self._draws += 1
        return jax.random.fold_in(self._key, self._draws)

    def split(self) -> "RandomStream":
        """A stream independent of this one's draws, and of other splits."""
        return RandomStream(jax.random.key_data(self._next_key()))

    def _from_words(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: str,
        rows: Tensor | None,
    ) -> Tensor:
        words = noise.words(jax.random.key_data(self._next_key()), shape, rows)
        # Without the barrier the compiler would draw and compile it for each use.
        return jax.lax.optimization_barrier(function(words, dtype))

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        return jax.random.uniform(self._next_key(), shape, dtype)


def restored_random_state(like: Tensor) -> AbstractContextManager[None]:
    """A context that changes nothing: JAX has no global generator."""
    return nullcontext()


def random_state(like: Tensor) -> Any:
    """`None`: JAX has no global generator."""
    return None


def set_random_state(like: Tensor, state: Any) -> None:
    """Nothing to do: see `random_state()`."""


def unrepeatable_draws(function: Callable[[Any], Any], inputs: Any) -> list[str]:
    """None: functions have no other source of random numbers."""
    return []
