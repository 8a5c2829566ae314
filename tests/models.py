"""Small models, data and a fixed perturbation that several test files share."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_nrs


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class FixedPerturbation(keras_nrs.perturbations.Perturbation):
    """The same delta at every step: `eps` times a NumPy pattern."""

    def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> list[Any]:
        patterns = [
            np.cos(np.arange(np.prod(w.shape)) + i).reshape(w.shape)
            for i, w in enumerate(weights)
        ]
        dtypes = [keras.backend.standardize_dtype(w.dtype) for w in weights]
        return [
            eps * keras.ops.convert_to_tensor(p.astype(d))
            for p, d in zip(patterns, dtypes, strict=True)
        ]


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class Subclassed(keras.Model):
    """Builds itself at the first batch, and has a submodel and no training argument."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = keras.Sequential(
            [layers.Flatten(), layers.Dense(8, activation="relu")]
        )
        self.head = layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.head(self.features(inputs))


def image_data(num: int = 64, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images with a class-dependent mean, and their classes."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, classes, num)
    x = rng.normal(size=(num, 6, 6, 1)) + y[:, None, None, None]
    return x.astype("float32"), y.astype("int32")


def cnn(
    *,
    dropout: float = 0.0,
    batch_norm: bool = True,
    penalty: float = 0.0,
    seed: int | None = None,
    compile: bool = True,
) -> keras.Model:
    """A small compiled CNN with logits for 3 classes.

    Dropout is seeded where `seed` is given: Keras's unseeded dropout draws from
    PyTorch's global generator.
    """
    regularizer = keras.regularizers.L2(penalty) if penalty else None
    stack: list[Any] = [keras.Input((6, 6, 1)), layers.Conv2D(4, 3)]
    if batch_norm:
        stack.append(layers.BatchNormalization(momentum=0.5))
    stack.append(layers.Activation("relu"))
    stack.append(layers.Flatten())
    if dropout:
        stack.append(layers.Dropout(dropout, seed=seed))
    stack.append(layers.Dense(8, activation="tanh", kernel_regularizer=regularizer))
    if dropout:
        stack.append(layers.Dropout(dropout, seed=None if seed is None else seed + 1))
    stack.append(layers.Dense(3))
    model = keras.Sequential(stack)
    if compile:
        compile_classifier(model)
    return model


def compile_classifier(model: keras.Model, **kwargs: Any) -> None:
    model.compile(
        **{
            "optimizer": keras.optimizers.SGD(0.05, momentum=0.9),
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
        }
        | kwargs
    )


def numpy_values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_equal(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    """Bit-identical lists of arrays."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


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
