"""The only code that imports a framework; each folder defines the same names."""

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
    from keras_nrs.backend.jax import gradient
    from keras_nrs.backend.jax import hessian_at
else:
    _backend = importlib.import_module(f"keras_nrs.backend.{keras.config.backend()}")
    RandomStream = _backend.RandomStream
    compile_function = _backend.compile_function
    data_parallel_scope = _backend.data_parallel_scope
    gradient = _backend.gradient
    hessian_at = _backend.hessian_at

__all__ = [
    "RandomStream",
    "compile_function",
    "data_parallel_scope",
    "gradient",
    "hessian_at",
]
