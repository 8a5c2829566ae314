"""Dense Hessians, by the frameworks' own means, and models to take them of."""

from typing import Any

import keras
import numpy as np
from keras import layers
from keras import ops

from tests.support.networks import compile_classifier

BACKEND = keras.config.backend()


class Product(layers.Layer):
    """Dense by Python's operators, z / (1 + z ** 2) as its activation if it has one.

    Of Keras's own operations some round float64 to float32: `matmul` on PyTorch, `tanh`
    on JAX.
    """

    def __init__(self, units: int, *, is_linear: bool = False) -> None:
        super().__init__()
        self.units = units
        self.is_linear = is_linear

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.bias = self.add_weight(shape=(self.units,), name="bias")

    def call(self, inputs: Any) -> Any:
        z = inputs @ self.kernel.value + self.bias.value
        return z if self.is_linear else z / (1 + z * z)


def classifier(**kwargs: Any) -> keras.Model:
    """A small network as it begins, and so with curvature of both signs."""
    model = keras.Sequential(
        [keras.Input((6,)), Product(12), Product(8), Product(3, is_linear=True)]
    )
    compile_classifier(model, **kwargs)
    return model


def data(num: int = 40, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, num)
    x = rng.normal(size=(num, size)) + y[:, None]
    return x.astype(keras.config.floatx()), y.astype("int32")


def dense_hessian(
    model: keras.Model, x: Any, y: Any, variables: list[Any], *, regularizers: bool
) -> np.ndarray:
    """The Hessian of the mean loss over all data at once."""
    others = {id(v): v.value for v in model.trainable_variables}
    state = [v.value for v in model.non_trainable_variables]
    x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    shapes = [tuple(v.shape) for v in variables]
    ends = np.cumsum([int(np.prod(s)) for s in shapes])

    def loss(flat: Any) -> Any:
        parts = [
            ops.reshape(flat[end - int(np.prod(s)) : end], s)
            for s, end in zip(shapes, ends, strict=True)
        ]
        values = others | {id(v): p for v, p in zip(variables, parts, strict=True)}
        y_pred, _, losses = model.stateless_call(
            list(values.values()), state, x, training=False, return_losses=True
        )
        total = model.loss(y, y_pred)
        return total + sum(losses) if regularizers else total

    flat = np.concatenate([ops.convert_to_numpy(v).ravel() for v in variables])
    return ops.convert_to_numpy(_hessian(loss, ops.convert_to_tensor(flat)))


def _hessian(function: Any, point: Any) -> Any:
    if BACKEND == "jax":
        import jax

        # As one program, because JAX would compile each operation by itself.
        return jax.jit(jax.hessian(function))(point)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def hessian(point: Any) -> Any:
            with tf.GradientTape(persistent=True) as outer:
                outer.watch(point)
                with tf.GradientTape() as inner:
                    inner.watch(point)
                    value = function(point)
                gradient = inner.gradient(value, point)
            return outer.jacobian(gradient, point, experimental_use_pfor=False)

        return hessian(point)
    import torch

    return torch.autograd.functional.hessian(function, point)
