"""Random tensors on TensorFlow."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from keras_nrs import noise

Tensor = Any


def _noise(
    function: Callable[..., Tensor],
    key: Tensor,
    shape: tuple[int, ...],
    dtype: str,
    rows: Tensor | None,
) -> Tensor:
    words = noise.words(tf.bitcast(tf.cast(key, "int32"), "uint32"), shape, rows)
    return function(words, dtype)


# As single operations it would pass over the memory many times.
_compiled_noise = tf.function(_noise, jit_compile=True, autograph=False)


def _fold_in(key: Tensor, index: Tensor) -> Tensor:
    """A key for an index.

    Compiled programs take the low 32 bits of a key: keys of 32 bits are the same there.
    """
    return tf.random.experimental.stateless_fold_in(key, index) & 0xFFFFFFFF


class RandomStream(noise.WordStream):
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = tf.cast(key, "int64") & 0xFFFFFFFF
        self._draws = 0

    # The noise of all weights is drawn at once.
    draws_whole = True
    cuts_whole = True

    def fold_in(self, index: Any) -> "RandomStream":
        """A stream independent of this one and of the streams of other indices."""
        # Negative, so that it never equals a draw's.
        index = -1 - tf.cast(index, "int64")
        return RandomStream(_fold_in(self._key, index))

    def _next_key(self) -> Tensor:
        self._draws += 1
        # With a Python int it would return a key of 32 bits instead of 64.
        draws = tf.constant(self._draws, "int64")
        return _fold_in(self._key, draws)

    def split(self) -> "RandomStream":
        """A stream independent of this one's draws, and of other splits."""
        return RandomStream(self._next_key())

    def _from_words(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: str,
        rows: Tensor | None,
    ) -> Tensor:
        return _compiled_noise(function, self._next_key(), shape, dtype, rows)

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        # XLA draws the same integers, but other floats.
        words = tf.random.stateless_uniform(
            shape, self._next_key(), minval=None, maxval=None, dtype="uint32"
        )
        return tf.cast(words & 0x7FFFFF, dtype) * 2.0**-23


def restored_random_state(like: Tensor) -> AbstractContextManager[None]:
    """A context that changes nothing: layers of Keras use no global generator here."""
    return nullcontext()


def random_state(like: Tensor) -> Any:
    """`None`: layers of Keras use no global generator here."""
    return None


def set_random_state(like: Tensor, state: Any) -> None:
    """Nothing to do: see `random_state()`."""


# Operations that draw other numbers at each call, whatever their arguments.
_DRAWS = (
    *("RandomUniform", "RandomUniformInt", "RandomStandardNormal", "RandomShuffle"),
    *("TruncatedNormal", "ParameterizedTruncatedNormal", "Multinomial"),
    *("RandomGamma", "RandomPoissonV2", "StatefulRandomBinomial"),
    *("StatefulStandardNormalV2", "StatefulTruncatedNormal", "StatefulUniform"),
    *("StatefulUniformInt", "StatefulUniformFullInt", "RngReadAndSkip"),
    "NonDeterministicInts",
)


def unrepeatable_draws(function: Callable[[Any], Any], inputs: Any) -> list[str]:
    """The operations of a function that draw other random numbers at each call.

    Args:
        function: A function of tensors.
        inputs: Its argument: tensors, or their specifications.
    """
    specs = tf.nest.map_structure(
        lambda t: (
            t if t is None or isinstance(t, tf.TypeSpec) else tf.type_spec_from_value(t)
        ),
        inputs,
    )

    def traced() -> Any:
        return tf.function(function).get_concrete_function(specs).graph.as_graph_def()

    if tf.distribute.has_strategy():
        # A strategy belongs to a thread. In a function within a step, its replicas
        # cannot exchange values, as synchronized BatchNorm does.
        with ThreadPoolExecutor(1) as other_thread:
            graph = other_thread.submit(traced).result()
    else:
        with tf.init_scope():
            graph = traced()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return [node.name for node in nodes if node.op in _DRAWS]
