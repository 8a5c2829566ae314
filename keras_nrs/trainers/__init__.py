"""The training step of each backend."""

import importlib
from typing import TYPE_CHECKING

import keras

if TYPE_CHECKING:
    from keras_nrs.trainers.jax import BackendTrainer
else:
    _backend = importlib.import_module(f"keras_nrs.trainers.{keras.config.backend()}")
    BackendTrainer = _backend.BackendTrainer

__all__ = ["BackendTrainer"]
