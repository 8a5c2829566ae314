"""Networks around layers with a state or a random draw, of Keras and custom ones."""

import random
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import layers
from keras import ops

from tests.support.conformance import BATCH_SIZE
from tests.support.conformance import CLASSES
from tests.support.conformance import OPTIONS
from tests.support.conformance import Network
from tests.support.conformance import classes
from tests.support.conformance import compiled
from tests.support.conformance import integers
from tests.support.conformance import normal

BACKEND = keras.config.backend()


class DropPath(layers.Layer):
    """Drops whole samples of a residual branch."""

    def __init__(self, rate: float, seed: int | None = None) -> None:
        super().__init__()
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, x: Any, training: bool = False) -> Any:
        if not training:
            return x
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        kept = keras.random.uniform(shape, seed=self.seed_generator) >= self.rate
        return x * ops.cast(kept, x.dtype) / (1 - self.rate)


class UnseededNoise(layers.Layer):
    """Draws from Keras's global generator."""

    def call(self, x: Any) -> Any:
        return x + 0.1 * keras.random.normal(ops.shape(x))


class HostNoise(layers.Layer):
    """Draws with Python: at each step on PyTorch, elsewhere when it is compiled."""

    def call(self, x: Any) -> Any:
        return x * random.uniform(0.5, 1.5)


class RawNoise(layers.Layer):
    """Draws with TensorFlow's own function."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return x + 0.1 * tf.random.normal(tf.shape(x))


class Measuring(layers.Layer):
    """Updates a metric in `call()`."""

    def __init__(self) -> None:
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def call(self, x: Any) -> Any:
        self.size.update_state(ops.mean(ops.abs(x)))
        return x


class AddingLoss(layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


class Counting(layers.Layer):
    """Counts its calls, as an integer and as a number."""

    def build(self, shape: Any) -> None:
        arguments = {"shape": (), "initializer": "zeros", "trainable": False}
        self.number = self.add_weight(**arguments)
        self.calls = self.add_weight(dtype="int32", **arguments)

    def call(self, x: Any) -> Any:
        self.number.assign(self.number + 1)
        self.calls.assign(self.calls + 1)
        return x / (1 + 0.01 * self.number)


class RunningMean(layers.Layer):
    """Subtracts a mean over all batches so far."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(
            shape=shape[1:], initializer="zeros", trainable=False
        )

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
        return x - self.mean


class Untracked(layers.Layer):
    """Assigns to a variable that Keras does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.untracked = SimpleNamespace()

    def build(self, shape: Any) -> None:
        self.untracked.variable = keras.Variable(0.0, trainable=False, name="hidden")

    def call(self, x: Any) -> Any:
        self.untracked.variable.assign(self.untracked.variable + 1.0)
        return x


class BatchFeatures(layers.Layer):
    """Compares each sample with the others of the batch."""

    def call(self, x: Any) -> Any:
        return ops.concatenate([x, x - ops.mean(x, axis=0, keepdims=True)], axis=-1)


class Residual(layers.Layer):
    """A branch that is dropped for some samples, beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(4)
        self.drop_path = DropPath(0.5, seed=3)

    def call(self, x: Any, training: bool = False) -> Any:
        return x + self.drop_path(self.dense(x), training=training)


def classifier(
    *stack: Any, shape: tuple[int, ...], batch_size: int | None = None, **kwargs: Any
) -> keras.Model:
    inputs = keras.Input(shape, batch_size=batch_size, **kwargs)
    return compiled(keras.Sequential([inputs, *stack, layers.Dense(CLASSES)]))


def network(*stack: Any, shape: tuple[int, ...] = (4,), **kwargs: Any) -> Network:
    """A classifier of normal inputs, made of functions that make its layers."""
    traits = {k: kwargs.pop(k) for k in ("draws", "mixes", "options") if k in kwargs}
    return Network(
        lambda: classifier(*(make() for make in stack), shape=shape, **kwargs),
        (normal(*shape), classes()),
        **traits,
    )


def of_images(*stack: Any, **kwargs: Any) -> Network:
    return network(*stack, layers.GlobalAveragePooling2D, shape=(8, 8, 3), **kwargs)


def of_sequences(*stack: Any, **kwargs: Any) -> Network:
    return network(*stack, layers.GlobalAveragePooling1D, shape=(5, 4), **kwargs)


def dense(**kwargs: Any) -> Any:
    return lambda: layers.Dense(4, **kwargs)


def conv(**kwargs: Any) -> Any:
    return lambda: layers.Conv2D(4, 3, padding="same", **kwargs)


def attention(make: Any, **kwargs: Any) -> Network:
    """An attention layer on one input, twice or three times."""

    def model() -> keras.Model:
        inputs = keras.Input((5, 4))
        layer = make()
        arguments = ([inputs, inputs],) if "lists" in kwargs else (inputs, inputs)
        x = layers.GlobalAveragePooling1D()(layer(*arguments))
        return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))

    return Network(model, (normal(5, 4), classes()), draws=True)


def augmentation(name: str, **kwargs: Any) -> Network:
    """A layer that changes images at random, in front of a convolution."""
    rng = np.random.default_rng(2)
    images = rng.uniform(size=(4 * BATCH_SIZE, 8, 8, 3)).astype("float32")

    def model() -> keras.Model:
        layer = getattr(layers, name)(seed=1, **kwargs)
        pooling = layers.GlobalMaxPooling2D()
        return classifier(layer, layers.Conv2D(4, 3), pooling, shape=(8, 8, 3))

    # All draw in the same way, so that a few options do for most of them.
    few = ("plain", "memory_efficient") if name == "AugMix" else ("plain",)
    options = tuple(OPTIONS) if name == "RandomFlip" else few
    return Network(model, (images, classes()), draws=True, options=options)


VALUES = {"value_range": (0.0, 1.0)}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "AugMix": VALUES,
    "CutMix": {},
    "MixUp": {},
    "RandAugment": VALUES,
    "RandomBrightness": {"factor": 0.5} | VALUES,
    "RandomColorDegeneration": {"factor": 0.5} | VALUES,
    "RandomColorJitter": {"brightness_factor": 0.5, "hue_factor": 0.2} | VALUES,
    "RandomContrast": {"factor": 0.5} | VALUES,
    "RandomCrop": {"height": 6, "width": 6},
    "RandomElasticTransform": VALUES,
    "RandomErasing": VALUES,
    "RandomFlip": {},
    "RandomGaussianBlur": {"kernel_size": 3, "sigma": 1.0} | VALUES,
    "RandomGrayscale": {},
    "RandomHue": {"factor": 0.5} | VALUES,
    "RandomInvert": VALUES,
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 4} | VALUES,
    "RandomRotation": {"factor": 0.2},
    "RandomSaturation": {"factor": 0.5} | VALUES,
    "RandomSharpness": {"factor": 0.5} | VALUES,
    "RandomShear": {"x_factor": 0.2, "y_factor": 0.2},
    "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
    "RandomZoom": {"height_factor": 0.3},
}


def adapted() -> keras.Model:
    normalization = layers.Normalization()
    normalization.adapt(2 * normal(4) + 1)
    return classifier(normalization, shape=(4,))


def discretized() -> keras.Model:
    discretization = layers.Discretization(num_bins=4, output_mode="int")
    discretization.adapt(normal(4))
    embedding = layers.Embedding(5, 3)
    return classifier(discretization, embedding, layers.Flatten(), shape=(4,))


def looked_up() -> keras.Model:
    return classifier(
        layers.IntegerLookup(vocabulary=[1, 2, 3, 5]),
        layers.Embedding(6, 3),
        layers.Flatten(),
        shape=(4,),
        dtype="int64",
    )


def low_rank() -> keras.Model:
    dense = layers.Dense(4)
    model = classifier(dense, shape=(4,))
    dense.enable_lora(2)
    return compiled(model)


LSTM = {"dropout": 0.3, "recurrent_dropout": 0.3, "seed": 1}

LAYERS: dict[str, Network] = {
    # Batch moments and other states.
    "BatchNormalization": of_images(
        conv(),
        lambda: layers.BatchNormalization(momentum=0.8),
        layers.ReLU,
        mixes=True,
    ),
    "frozen BatchNormalization": of_images(
        conv(), lambda: layers.BatchNormalization(trainable=False), layers.ReLU
    ),
    "TimeDistributed BatchNormalization": network(
        dense(),
        lambda: layers.TimeDistributed(layers.BatchNormalization(momentum=0.8)),
        layers.ReLU,
        layers.GlobalAveragePooling3D,
        shape=(2, 3, 3, 3),
        mixes=True,
    ),
    "SpectralNormalization": network(
        lambda: layers.SpectralNormalization(layers.Dense(4))
    ),
    "Normalization": Network(adapted, (2 * normal(4) + 1, classes())),
    "Discretization": Network(discretized, (normal(4), classes())),
    "IntegerLookup": Network(
        looked_up, (integers(4, high=6).astype("int64"), classes())
    ),
    "stateful LSTM": network(
        lambda: layers.LSTM(4, stateful=True), shape=(5, 4), batch_size=BATCH_SIZE
    ),
    "LoRA": Network(low_rank, (normal(4), classes())),
    # Random draws.
    "Dropout": network(dense(), lambda: layers.Dropout(0.4, seed=1), draws=True),
    "unseeded Dropout": network(dense(), lambda: layers.Dropout(0.4), draws=True),
    "SpatialDropout1D": of_sequences(
        dense(), lambda: layers.SpatialDropout1D(0.4, seed=1), draws=True
    ),
    "SpatialDropout2D": of_images(
        conv(), lambda: layers.SpatialDropout2D(0.4, seed=1), draws=True
    ),
    "SpatialDropout3D": network(
        dense(),
        lambda: layers.SpatialDropout3D(0.4, seed=1),
        layers.GlobalAveragePooling3D,
        shape=(2, 2, 2, 3),
        draws=True,
    ),
    "GaussianNoise": network(lambda: layers.GaussianNoise(0.3, seed=1), draws=True),
    "GaussianDropout": network(lambda: layers.GaussianDropout(0.3, seed=1), draws=True),
    "AlphaDropout": network(lambda: layers.AlphaDropout(0.3, seed=1), draws=True),
    "LSTM": network(lambda: layers.LSTM(4, **LSTM), shape=(5, 4), draws=True),
    "GRU": network(lambda: layers.GRU(4, **LSTM), shape=(5, 4), draws=True),
    "SimpleRNN": network(lambda: layers.SimpleRNN(4, **LSTM), shape=(5, 4), draws=True),
    "Bidirectional LSTM": network(
        lambda: layers.Bidirectional(layers.LSTM(4, **LSTM)), shape=(5, 4), draws=True
    ),
    "ConvLSTM2D": network(
        lambda: layers.ConvLSTM2D(3, 2, **LSTM),
        layers.GlobalAveragePooling2D,
        shape=(3, 4, 4, 2),
        draws=True,
    ),
    "TimeDistributed Dropout": of_sequences(
        lambda: layers.TimeDistributed(layers.Dropout(0.4, seed=1)), draws=True
    ),
    "MultiHeadAttention": attention(
        lambda: layers.MultiHeadAttention(2, 2, dropout=0.3, seed=1)
    ),
    "GroupQueryAttention": attention(
        lambda: layers.GroupQueryAttention(2, 4, 2, dropout=0.3, seed=1)
    ),
    "Attention": attention(
        lambda: layers.Attention(use_scale=True, dropout=0.3, seed=1), lists=True
    ),
    "AdditiveAttention": attention(
        lambda: layers.AdditiveAttention(dropout=0.3, seed=1), lists=True
    ),
    **{name: augmentation(name, **kw) for name, kw in AUGMENTATIONS.items()},
    # Losses and metrics of layers.
    "ActivityRegularization": network(
        dense(), lambda: layers.ActivityRegularization(l1=0.01, l2=0.01)
    ),
    "penalties": network(
        dense(kernel_regularizer="l2", activity_regularizer="l2"),
        lambda: layers.Dense(4, kernel_constraint="max_norm", bias_regularizer="l1"),
    ),
    "AddingLoss": network(dense(), AddingLoss),
    "Measuring": network(dense(), Measuring),
    # Custom layers.
    "DropPath": network(dense(), lambda: DropPath(0.4, seed=1), draws=True),
    "Residual": network(Residual, Residual, draws=True),
    "UnseededNoise": network(UnseededNoise, draws=True),
    "Counting": network(dense(), Counting),
    "RunningMean": network(dense(), RunningMean, mixes=True),
    "Untracked": network(dense(), Untracked),
    "BatchFeatures": network(BatchFeatures, mixes=True),
}
if BACKEND == "torch":
    options = ("plain", "memory_efficient", "interval", "groups")
    LAYERS["HostNoise"] = network(dense(), HostNoise, draws=True, options=options)
if BACKEND == "tensorflow":
    LAYERS |= {
        "synchronized BatchNormalization": of_images(
            conv(),
            lambda: layers.BatchNormalization(momentum=0.8, synchronized=True),
            layers.ReLU,
            mixes=True,
        ),
        "RawNoise": network(RawNoise, draws=True),
    }
