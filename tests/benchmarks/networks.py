"""The networks that are timed, the ways to train them, and data of their shapes."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

import keras_nrs
from keras_nrs import models
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations import RelativeBall

NUM_CLASSES = 10
TOKENS = 1_000_000
# Norm of delta divided by that of the weights, at the most.
RADIUS = 0.3

PLAIN = "plain Keras"
# Arguments of `wrap()`. The plain model is not wrapped.
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "NRS": {},
    "NRS, rademacher": {"perturbation": RelativeBall(noise="rademacher")},
    "NRS, interval=2": {"interval": 2},
    "NRS, perturbed_fraction=0.5": {"perturbed_fraction": 0.5},
    "NRS, memory_efficient": {"memory_efficient": True},
    "RPR": {"scheme": "rpr"},
    "RPR, filterwise": {"scheme": "rpr", "perturbation": FilterwiseBall()},
    "SAM": {"scheme": "sam", "perturbation": None},
    "ASAM": {"scheme": "asam", "perturbation": None},
}


def mlp(width: int = 2048) -> keras.Model:
    """Two hidden layers: 4.2 million weights at the default width."""
    dense = [layers.Dense(width, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((32,)), *dense, layers.Dense(NUM_CLASSES)])


def cnn() -> keras.Model:
    """Three convolutions with BatchNorm: 28,000 weights."""
    stack: list[Any] = [keras.Input((32, 32, 3))]
    for filters in (16, 32, 64):
        stack += [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
        ]
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(NUM_CLASSES)])


def vit() -> keras.Model:
    """ViT-Ti/4 on images of 32 x 32: 5.4 million weights."""
    import keras_hub  # Which a machine for the other networks need not have.

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
    )
    class_token = backbone.output[:, 0]
    return keras.Model(backbone.input, layers.Dense(NUM_CLASSES)(class_token))


def wide_resnet() -> keras.Model:
    """WideResNet-16-4: 2.7 million weights."""
    return models.wide_resnet(depth=16, width=4)


def bi_lstm() -> keras.Model:
    """A bidirectional LSTM on sequences of 100 vectors: 99,000 weights."""
    lstm = layers.Bidirectional(layers.LSTM(64))
    return keras.Sequential([keras.Input((100, 128)), lstm, layers.Dense(NUM_CLASSES)])


def embedding() -> keras.Model:
    """A table of a million rows, 32 million weights, of which a batch reads 2,560."""
    tokens = keras.Input((20,), dtype="int32")
    table = layers.Embedding(TOKENS, 32)
    mean = layers.GlobalAveragePooling1D()(table(tokens))
    return keras.Model(tokens, layers.Dense(NUM_CLASSES)(mean))


class Network(NamedTuple):
    """A network, and on how much data it is timed.

    Attributes:
        make: Makes the model.
        batch_size: Number of samples in a batch.
        steps: Number of steps in a timed run.
    """

    make: Callable[[], keras.Model]
    batch_size: int
    steps: int


NETWORKS = {
    "MLP": Network(mlp, 32, 60),
    "CNN": Network(cnn, 32, 60),
    "ViT-Ti/4": Network(vit, 32, 2),
    "WRN-16-4": Network(wide_resnet, 64, 2),
    "BiLSTM": Network(bi_lstm, 32, 10),
    "Embedding": Network(embedding, 128, 10),
}


def compiled(make: Callable[[], keras.Model]) -> keras.Model:
    """A model with the same weights at each call, compiled for classification."""
    keras.utils.set_random_seed(0)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def trained(make: Callable[[], keras.Model], variant: str) -> keras.Model:
    """The model, ready to be trained in one of the ways of `VARIANTS`."""
    model = compiled(make)
    if variant == PLAIN:
        return model
    arguments = {"eps": RADIUS, "perturbation": RelativeBall()} | VARIANTS[variant]
    return keras_nrs.wrap(model, **arguments)


def data(model: keras.Model, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Random samples for a model, and random classes."""
    rng = np.random.default_rng(0)
    shape = num_samples, *model.input_shape[1:]
    y = rng.integers(0, NUM_CLASSES, num_samples)
    if model.inputs[0].dtype == "int32":
        return rng.integers(0, TOKENS, shape).astype("int32"), y
    return rng.normal(size=shape).astype("float32"), y
