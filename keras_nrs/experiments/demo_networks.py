"""The networks of the demo, with logits as outputs, and their initial weights."""

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_nrs._digits import NUM_CLASSES

Array = NDArray[Any]


def small_cnn(
    input_shape: tuple[int, ...] = (8, 8, 1), num_classes: int = NUM_CLASSES
) -> keras.Model:
    """Convolutions of 16, 32 and 32 channels and a head that returns logits.

    Args:
        input_shape: `(height, width, channels)` of images, or `(length, channels)` of
            sequences.
        num_classes: Number of logits.
    """
    layers = keras.layers
    is_image = len(input_shape) == 3
    convolution = layers.Conv2D if is_image else layers.Conv1D
    pooling = layers.MaxPooling2D if is_image else layers.MaxPooling1D
    options = {
        "padding": "same",
        "activation": "relu",
        "kernel_initializer": "he_normal",
    }
    return keras.Sequential(
        [
            keras.Input(input_shape),
            convolution(16, 3, **options),
            convolution(32, 3, **options),
            pooling(),
            convolution(32, 3, **options),
            pooling(),
            layers.Flatten(),
            layers.Dense(num_classes),
        ]
    )


def mlp() -> keras.Model:
    """Two hidden layers of 128 units, for images of 28 x 28 pixels."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(NUM_CLASSES),
        ]
    )


def initial_weights(model: keras.Model, seed: int) -> list[Array]:
    """Zero biases and normal kernels of variance 2 / fan-in, equal on all backends.

    Reference: [He et al., 2015](https://arxiv.org/abs/1502.01852), Equation 10.
    """
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=v.shape) * np.sqrt(2 / np.prod(v.shape[:-1]))
        if len(v.shape) > 1
        else np.zeros(v.shape)
        for v in model.weights
    ]
