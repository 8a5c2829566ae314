"""All devices of a machine on TensorFlow."""

from contextlib import AbstractContextManager
from contextlib import nullcontext

import tensorflow as tf


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices()
    scope: AbstractContextManager[None] = nullcontext()
    if len(devices) > 1:
        scope = tf.distribute.MirroredStrategy([d.name for d in devices]).scope()
    return scope
