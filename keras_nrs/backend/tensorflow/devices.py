"""Devices and processes on TensorFlow."""

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


def scope_of(model: Any) -> AbstractContextManager[Any]:
    """The scope of the strategy that a model was made under."""
    scope: AbstractContextManager[Any] = model.distribute_strategy.scope()
    return scope


def process_index(model: Any) -> int:
    """The index of this worker in the cluster of a model's strategy."""
    cluster = model.distribute_strategy.cluster_resolver
    return 0 if cluster is None else cluster.task_id or 0


def values_of_processes(values: list[int]) -> list[list[int]]:
    """These values. TensorFlow's own checks find workers that disagree."""
    return [values]


def loop_over_batches() -> AbstractContextManager[None]:
    """A context for `fit()` and the like: TensorFlow places batches by itself."""
    return nullcontext()
