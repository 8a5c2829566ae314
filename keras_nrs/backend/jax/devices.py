"""All devices of a machine on JAX."""

from contextlib import AbstractContextManager
from contextlib import nullcontext

import jax
import keras


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    scope: AbstractContextManager[None] = nullcontext()
    if jax.device_count() > 1:
        scope = keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    return scope
