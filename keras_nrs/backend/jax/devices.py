"""Devices and processes on JAX."""

from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import jax
import keras

from keras_nrs.keras_internals import placing_jax_batches


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices, each with part of a batch."""
    scope: AbstractContextManager[None] = nullcontext()
    if jax.device_count() > 1:
        scope = keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    return scope


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


def values_of_processes(values: list[int]) -> list[list[int]]:
    """These values in every process. All of them must call this."""
    if jax.process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(jax.numpy.asarray(values))
    return [list(map(int, row)) for row in gathered]


def replicas() -> tuple[str, int, Any]:
    """The mesh axis over which batches are split, its size, and the mesh."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return "", 1, None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    return axis, mesh.shape[axis], mesh


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
