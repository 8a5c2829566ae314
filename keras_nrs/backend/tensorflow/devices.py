"""Devices and processes on TensorFlow."""

import functools
import os
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

_joined: list[tf.distribute.Strategy] = []


def join_processes() -> None:
    """Join the workers of TF_CONFIG.

    Raises:
        ValueError: if it is missing.
    """
    if "TF_CONFIG" not in os.environ:
        raise ValueError(
            "Several workers need the environment variable TF_CONFIG, the description "
            "of the cluster and of this worker. Received: none. See "
            "https://www.tensorflow.org/guide/distributed_training"
        )
    _joined.append(tf.distribute.MultiWorkerMirroredStrategy())


def processes() -> tuple[int, int]:
    """The index of this worker, and the number of workers."""
    if not _joined:
        return 0, 1
    cluster = _joined[0].cluster_resolver
    return cluster.task_id or 0, cluster.cluster_spec().num_tasks("worker")


@functools.cache
def _strategy() -> Any:
    """One for the whole process: TensorFlow mixes up the collectives of several."""
    if _joined:
        return _joined[0]
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    strategy = _strategy()
    scope: AbstractContextManager[None] = nullcontext()
    if strategy.num_replicas_in_sync > 1:
        scope = strategy.scope()
    return scope


def fit_scope() -> AbstractContextManager[None]:
    """A scope for `fit()` of a model that was built in `data_parallel_scope()`.

    It knows its strategy, in whose scope no other model could be evaluated.
    """
    return nullcontext()


def scope_of(model: Any) -> AbstractContextManager[Any]:
    """The scope of the strategy that a model was made under."""
    scope: AbstractContextManager[Any] = model.distribute_strategy.scope()
    return scope


def process_index(model: Any) -> int:
    """The index of this worker in the cluster of a model's strategy."""
    cluster = model.distribute_strategy.cluster_resolver
    return 0 if cluster is None else cluster.task_id or 0


def values_of_processes(values: list[float], model: Any = None) -> list[list[float]]:
    """These values in every worker. All of them must call this.

    Args:
        values: Those of this worker.
        model: A model of the workers, which may have a strategy of the user's;
            `None` for the workers that `join_processes()` joined.
    """
    strategy = _joined[0] if _joined else getattr(model, "distribute_strategy", None)
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return [values]
    number = strategy.cluster_resolver.cluster_spec().num_tasks("worker")
    if number == 1:
        return [values]

    def gathered() -> Any:
        context = tf.distribute.get_replica_context()
        return context.all_gather(tf.constant([words]), axis=0)

    words = np.asarray(values, "float64").view("int32")
    (rows, *_) = strategy.experimental_local_results(strategy.run(gathered))
    # A worker with several devices has a row for each.
    rows = rows.numpy()[:: len(rows) // number]
    return [np.ascontiguousarray(row).view("float64").tolist() for row in rows]


def shares_of_workers(dataset: Any, batch_size: int) -> Any:
    """A data set of this worker's share of each batch, as `fit()` takes it.

    Without that, TensorFlow takes a share of it again.

    Args:
        dataset: Batches of this worker's samples.
        batch_size: Samples in one of them.
    """
    if not _joined:
        return dataset
    num_devices = _strategy().num_replicas_in_sync // processes()[1]
    if batch_size % num_devices:
        raise ValueError(
            "`batch_size` must be a multiple of the number of devices of all workers. "
            f"Received: {batch_size} samples for {num_devices} devices of a worker."
        )
    of_device = dataset.rebatch(batch_size // num_devices)
    return _strategy().distribute_datasets_from_function(lambda context: of_device)


def loop_over_batches() -> AbstractContextManager[None]:
    """A context for `fit()` and the like: TensorFlow places batches by itself."""
    return nullcontext()
