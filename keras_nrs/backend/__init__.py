"""Functions of the frameworks: each folder defines the same names.

Only this folder and `trainers/` import a framework.
"""

import importlib
from typing import TYPE_CHECKING

import keras

_BACKENDS = ("jax", "tensorflow", "torch")

if keras.config.backend() not in _BACKENDS:
    raise ImportError(
        f"keras_nrs trains on the backends {list(_BACKENDS)}. Received: "
        f"keras.config.backend()={keras.config.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of them before importing keras."
    )

if TYPE_CHECKING:
    from keras_nrs.backend.jax import RandomStream
    from keras_nrs.backend.jax import compile_function
    from keras_nrs.backend.jax import data_parallel_scope
    from keras_nrs.backend.jax import eager_scope
    from keras_nrs.backend.jax import fit_scope
    from keras_nrs.backend.jax import gradient
    from keras_nrs.backend.jax import gradient_with
    from keras_nrs.backend.jax import hessian_at
    from keras_nrs.backend.jax import join_processes
    from keras_nrs.backend.jax import loop_over_batches
    from keras_nrs.backend.jax import not_in_graphs
    from keras_nrs.backend.jax import process_index
    from keras_nrs.backend.jax import processes
    from keras_nrs.backend.jax import random_state
    from keras_nrs.backend.jax import reshape
    from keras_nrs.backend.jax import restored_random_state
    from keras_nrs.backend.jax import scope_of
    from keras_nrs.backend.jax import set_random_state
    from keras_nrs.backend.jax import shares_of_workers
    from keras_nrs.backend.jax import sum_of_squares
    from keras_nrs.backend.jax import sums_of_squares
    from keras_nrs.backend.jax import take_rows
    from keras_nrs.backend.jax import unrepeatable_draws
    from keras_nrs.backend.jax import values_of_processes
else:
    _backend = importlib.import_module(f"keras_nrs.backend.{keras.config.backend()}")
    RandomStream = _backend.RandomStream
    compile_function = _backend.compile_function
    data_parallel_scope = _backend.data_parallel_scope
    eager_scope = _backend.eager_scope
    fit_scope = _backend.fit_scope
    gradient = _backend.gradient
    gradient_with = _backend.gradient_with
    hessian_at = _backend.hessian_at
    join_processes = _backend.join_processes
    loop_over_batches = _backend.loop_over_batches
    not_in_graphs = _backend.not_in_graphs
    process_index = _backend.process_index
    processes = _backend.processes
    random_state = _backend.random_state
    restored_random_state = _backend.restored_random_state
    scope_of = _backend.scope_of
    set_random_state = _backend.set_random_state
    unrepeatable_draws = _backend.unrepeatable_draws
    shares_of_workers = _backend.shares_of_workers
    reshape = _backend.reshape
    sum_of_squares = _backend.sum_of_squares
    sums_of_squares = _backend.sums_of_squares
    take_rows = _backend.take_rows
    values_of_processes = _backend.values_of_processes

__all__ = [
    "RandomStream",
    "compile_function",
    "data_parallel_scope",
    "eager_scope",
    "fit_scope",
    "gradient",
    "gradient_with",
    "hessian_at",
    "join_processes",
    "loop_over_batches",
    "not_in_graphs",
    "process_index",
    "processes",
    "random_state",
    "reshape",
    "restored_random_state",
    "scope_of",
    "set_random_state",
    "shares_of_workers",
    "sum_of_squares",
    "sums_of_squares",
    "take_rows",
    "unrepeatable_draws",
    "values_of_processes",
]
