"""The default of `wrap()`: never inert, and harmless to training, on 12 networks."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs._digits import load_digits

# The least divergence, in nats, that changes a training.
LEAST_DIVERGENCE = 1e-3
EPOCHS = 3


Model = keras.Model


def _classifier(*stack: layers.Layer) -> Model:
    return keras.Sequential([keras.Input((8, 8, 1)), *stack, layers.Dense(10)])


def _batch_norm(**kwargs: object) -> layers.Layer:
    """Its statistics follow a short training."""
    return layers.BatchNormalization(momentum=0.8, **kwargs)


def _conv(filters: int, **kwargs: object) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", **kwargs)


def mlp() -> Model:
    hidden = [layers.Dense(64, activation="relu") for _ in range(2)]
    return _classifier(layers.Flatten(), *hidden)


def cnn() -> Model:
    stack = [_conv(16, activation="relu"), _conv(32, activation="relu", strides=2)]
    return _classifier(*stack, layers.Flatten())


def resnet() -> Model:
    x = inputs = keras.Input((8, 8, 1))
    x = _conv(16)(x)
    for _ in range(2):
        y = layers.ReLU()(_batch_norm()(x))
        y = layers.ReLU()(_batch_norm()(_conv(16)(y)))
        x = x + _conv(16)(y)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return Model(inputs, layers.Dense(10)(x))


def vit() -> Model:
    return keras_nrs.models.vit((8, 8, 1), 10, size=(32, 2), patch_size=2, depth=2)


def lstm() -> Model:
    return _classifier(layers.Reshape((8, 8)), layers.LSTM(32))


def transformer() -> Model:
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(32)(layers.Reshape((8, 8))(inputs))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 16)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(32, activation="gelu")(x))
    return Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def mobile_net() -> Model:
    stack: list[layers.Layer] = [_conv(16)]
    for _ in range(2):
        stack += [layers.DepthwiseConv2D(3, padding="same"), layers.Conv2D(32, 1)]
        stack += [_batch_norm(), layers.ReLU(6.0)]
    return _classifier(*stack, layers.GlobalAveragePooling2D())


def conv_next() -> Model:
    inputs = keras.Input((8, 8, 1))
    x = layers.LayerNormalization()(layers.Conv2D(24, 2, strides=2)(inputs))
    for _ in range(2):
        y = layers.DepthwiseConv2D(3, padding="same")(x)
        y = layers.Dense(96, activation="gelu")(layers.LayerNormalization()(y))
        x = x + layers.Dense(24)(y)
    return Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def u_net() -> Model:
    inputs = keras.Input((8, 8, 1))
    fine = _conv(16, activation="relu")(inputs)
    coarse = _conv(32, activation="relu", strides=2)(fine)
    up = layers.Conv2DTranspose(16, 2, strides=2, activation="relu")(coarse)
    x = layers.Concatenate()([fine, up])
    return Model(inputs, _conv(10)(x))


class GraphConvolution(layers.Layer):
    """Mixes the features of the pixels that touch, and maps them."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.dense = layers.Dense(units, activation="relu")
        place = np.stack(np.divmod(np.arange(64), 8), axis=1)
        distance = np.abs(place[:, None] - place[None]).max(axis=-1)
        adjacency = (distance <= 1).astype("float32")
        self.mix = adjacency / adjacency.sum(axis=1, keepdims=True)

    def call(self, x: object) -> object:
        return self.dense(keras.ops.matmul(self.mix, x))


def graph() -> Model:
    stack = [layers.Reshape((64, 1)), GraphConvolution(32), GraphConvolution(32)]
    return _classifier(*stack, layers.Flatten())


def low_rank() -> Model:
    """One factor of each pair is zero at first: the first steps change nothing."""
    hidden = layers.Dense(64, activation="relu")
    model = _classifier(layers.Flatten(), hidden)
    hidden.enable_lora(4)
    return model


def mixed_precision() -> Model:
    stack = [
        layer
        for filters in (16, 32)
        for layer in (
            _conv(filters, dtype="mixed_bfloat16"),
            _batch_norm(dtype="mixed_bfloat16"),
            layers.ReLU(dtype="mixed_bfloat16"),
        )
    ]
    return _classifier(*stack, layers.GlobalAveragePooling2D())


NETWORKS: list[Callable[[], Model]] = [
    *(mlp, cnn, resnet, vit, lstm, transformer, mobile_net, conv_next, u_net, graph),
    *(low_rank, mixed_precision),
]


@pytest.mark.matrix
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_trains_and_perturbs(make: Callable[[], Model]) -> None:
    x, y = load_digits()
    x, y = x[:400], y[:400]
    if make is u_net:  # Each lit pixel has the class of its digit.
        y = np.where(x[..., 0] > 0.5, y[:, None, None], 0)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    wrapped = keras_nrs.wrap(model, seed=0)
    history = wrapped.fit(x, y, batch_size=20, epochs=EPOCHS, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert max(history["model_divergence"]) > LEAST_DIVERGENCE
    assert history["loss"][-1] < history["loss"][0]
    assert model.evaluate(x, y, verbose=0) < history["loss"][0]
