"""Gradients by the means of each framework."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def value_and_gradients(
    function: Callable[..., Any], tensors: Sequence[Any]
) -> tuple[float, list[np.ndarray]]:
    """A scalar function of tensors, and its gradient in each of them."""
    if keras.config.backend() == "jax":
        import jax

        argnums = tuple(range(len(tensors)))
        value, gradients = jax.value_and_grad(function, argnums=argnums)(*tensors)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        gradients = tape.gradient(value, tensors)
    else:
        import torch

        tensors = [t.clone().detach().requires_grad_() for t in tensors]
        value = function(*tensors)
        gradients = torch.autograd.grad(value, tensors)
        value = value.detach()
    to_numpy = keras.ops.convert_to_numpy
    return float(to_numpy(value)), [to_numpy(gradient) for gradient in gradients]
