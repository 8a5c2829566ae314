"""Devices and processes on JAX."""

import os
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import jax
import keras
import numpy as np

from keras_nrs.keras_internals import placing_jax_batches

# Seconds after which the others of a process that has died end with an error.
_HEARTBEAT_TIMEOUT = 30


def join_processes() -> None:
    """Join the processes of SLURM, Open MPI, Kubernetes, a TPU pod, or by variables.

    These are Keras's, `KERAS_DISTRIBUTION_JOB_ADDRESSES` and the like.

    Raises:
        ValueError: if the environment tells of no other processes.
    """
    given = {
        name: os.environ.get(f"KERAS_DISTRIBUTION_{name}")
        for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    }
    addresses, number, index = given.values()
    try:
        jax.distributed.initialize(
            addresses and addresses.split(",")[0],
            number and int(number),
            index and int(index),
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise ValueError(
            "Several processes need an environment that JAX knows (SLURM, Open MPI, "
            "Kubernetes, a TPU pod) or the variables KERAS_DISTRIBUTION_JOB_ADDRESSES "
            "(of the first process, such as 10.0.0.1:1234), _NUM_PROCESSES and "
            f"_PROCESS_ID. Received: {given}. {error}"
        ) from error


def processes() -> tuple[int, int]:
    """The index of this process, and the number of processes."""
    return jax.process_index(), jax.process_count()


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    scope: AbstractContextManager[None] = nullcontext()
    if jax.device_count() > 1:
        scope = keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    return scope


def fit_scope() -> AbstractContextManager[None]:
    """A scope for `fit()` of a model that was built in `data_parallel_scope()`."""
    return data_parallel_scope()


def scope_of(model: Any) -> AbstractContextManager[Any]:
    """A scope that places new variables on the devices of a model."""
    is_placed = keras.distribution.distribution() is not None
    sharding = model.variables[0].value.sharding if model.variables else None
    if is_placed or not isinstance(sharding, jax.sharding.NamedSharding):
        return nullcontext()
    devices = sharding.mesh.devices
    mesh = keras.distribution.DeviceMesh(
        devices.shape,
        sharding.mesh.axis_names,
        [f"{d.platform}:{d.id}" for d in devices.flatten()],
    )
    # Without a layout for any variable: they are replicated.
    layouts = keras.distribution.LayoutMap(mesh)
    scope: Any = keras.distribution.ModelParallel(layout_map=layouts).scope()
    return scope


def process_index(model: Any) -> int:
    """The index of this process in a run of several."""
    return jax.process_index()


def values_of_processes(values: list[float], model: Any = None) -> list[list[float]]:
    """These values in every process. All of them must call this."""
    if jax.process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    # As integers, because JAX would round them to 32 bits.
    words = np.asarray(values, "float64").view("int32")
    gathered = np.asarray(multihost_utils.process_allgather(words))
    return [np.ascontiguousarray(row).view("float64").tolist() for row in gathered]


def replicas() -> tuple[str, int, Any]:
    """The mesh axis over which batches are split, its size, and the mesh."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return "", 1, None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    return axis, mesh.shape[axis], mesh


def shares_of_workers(dataset: Any, batch_size: int) -> Any:
    """A data set of this process's share of each batch, as `fit()` takes it."""
    return dataset


def loop_over_batches() -> AbstractContextManager[None]:
    """A context for Keras's `fit()`, `evaluate()` and `predict()`.

    Batches that do not divide among the devices go to all of them as a whole. Keras
    refuses to place them.
    """
    return placing_jax_batches(_place)


def _place(data: Any, layouts: Any, place_in_keras: Any) -> Any:
    _, num_replicas, mesh = replicas()
    sizes = {t.shape[0] for t in keras.tree.flatten(data) if t is not None}
    num_processes = jax.process_count()
    num_local = max(1, num_replicas // num_processes)
    if all(size % num_local == 0 for size in sizes):
        return place_in_keras(data, layouts)
    if num_processes > 1:
        raise ValueError(
            "In a run of several processes, the batches of each must divide among "
            f"its devices. Received: a batch of {sizes} samples for {num_local} "
            "devices. Use dataset.batch(batch_size, drop_remainder=True) with a "
            f"batch size that is a multiple of {num_replicas}."
        )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return keras.tree.map_structure(
        lambda t: None if t is None else jax.device_put(t, everywhere), data
    )
