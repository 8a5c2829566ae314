"""All devices of a machine on TensorFlow."""

import functools
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import tensorflow as tf


@functools.cache
def _strategy() -> Any:
    """One for the whole process: TensorFlow mixes up the collectives of several."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    strategy = _strategy()
    scope: AbstractContextManager[None] = nullcontext()
    if strategy.num_replicas_in_sync > 1:
        scope = strategy.scope()
    return scope
