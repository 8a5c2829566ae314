"""The networks of the study, with logits as outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import layers
from keras import ops

from keras_nrs import models
from keras_nrs.models.layers import HE_FAN_IN
from keras_nrs.models.layers import batch_norm
from keras_nrs.models.layers import batch_norm_relu
from keras_nrs.models.layers import conv

Shape = tuple[int, ...]


def cnn_1d(input_shape: Shape, num_classes: int) -> keras.Model:
    """Three strided convolutions of 32 filters: 8,010 weights for MNIST-1D.

    Reference: Greydanus and Kobak (2020), https://arxiv.org/abs/2011.14439
    """
    convolutions = [
        layers.Conv1D(
            32,
            kernel_size,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
        )
        for kernel_size in (5, 3, 3)
    ]
    return keras.Sequential(
        [
            keras.Input(input_shape),
            *convolutions,
            layers.Flatten(),
            layers.Dense(num_classes),
        ]
    )


def resnet8(input_shape: Shape, num_classes: int) -> keras.Model:
    """Three residual blocks of 8, 16, 32 filters with BatchNorm: 20,146 weights.

    The first convolution has strides of 2: a run then takes a third of the time.
    """
    inputs = keras.Input(input_shape)
    x = batch_norm_relu(conv(8, 3, 2, HE_FAN_IN)(inputs))
    for filters, strides in ((8, 1), (16, 2), (32, 2)):
        y = batch_norm_relu(conv(filters, 3, strides, HE_FAN_IN)(x))
        y = batch_norm()(conv(filters, 3, 1, HE_FAN_IN)(y))
        if strides > 1:
            x = batch_norm()(conv(filters, 1, strides, HE_FAN_IN)(x))
        x = layers.ReLU()(layers.add([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(num_classes)(x))


def mlp(input_shape: Shape, num_classes: int) -> keras.Model:
    """Two hidden layers of 128 units: 118,282 weights for Fashion-MNIST."""
    hidden = [
        layers.Dense(128, activation="relu", kernel_initializer="he_normal")
        for _ in range(2)
    ]
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            *hidden,
            layers.Dense(num_classes),
        ]
    )


NETWORKS: dict[str, Callable[[Shape, int], keras.Model]] = {
    "cnn": cnn_1d,
    "resnet8": resnet8,
    "mlp": mlp,
    "vit": partial(models.vit, size=(48, 3), patch_size=7, depth=3),
    "resnet18": models.resnet18,
    "wrn28-10": models.wide_resnet,
    "vit-ti": partial(models.vit, size="ti", patch_size=4),
}


def with_dropout(model: keras.Model, rate: float) -> keras.Model:
    """The same layers, with dropout before the last one."""
    *_, features, last = model.layers
    dropped = layers.Dropout(rate)(features.output)
    return keras.Model(model.inputs, last(dropped))


class LastLayerPenalty(layers.Layer):  # type: ignore[misc]
    """Adds a penalty on the inputs and the kernel of the last layer to the loss.

    It is `rate` times the mean over the batch of the squared norms of the inputs, plus
    the squared norm of the kernel. On wrong labels it does much of what SAM does.

    Args:
        last: The last layer, which is built.
        rate: Weight of the penalty.

    Reference: Baek et al. (2024), https://arxiv.org/abs/2405.03676
    """

    def __init__(self, last: keras.Layer, rate: float) -> None:
        super().__init__()
        # In a tuple, the layer stays the model's alone.
        self._last, self._rate = (last,), rate

    def call(self, inputs: Any) -> Any:
        squares = ops.mean(ops.sum(ops.square(inputs), axis=-1))
        squares += ops.sum(ops.square(self._last[0].kernel))
        self.add_loss(self._rate * squares)
        return inputs


def with_last_layer_penalty(model: keras.Model, rate: float) -> keras.Model:
    """The same layers, which share their weights with `model`, and a penalty."""
    *_, features, last = model.layers
    inputs = LastLayerPenalty(last, rate)(features.output)
    return keras.Model(model.inputs, last(inputs))
