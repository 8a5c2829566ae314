"""Small models of the kinds that users train."""

from typing import Any

import keras
from keras import layers
from keras import ops

from tests.support.conformance import CLASSES
from tests.support.conformance import RATE
from tests.support.conformance import Network
from tests.support.conformance import classes
from tests.support.conformance import compiled
from tests.support.conformance import integers
from tests.support.conformance import normal
from tests.support.conformance_layers import DropPath

BACKEND = keras.config.backend()
WORDS = 9


class Sampling(layers.Layer):
    """A draw from a normal distribution, whose divergence from (0, 1) it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)

    def noise(self, shape: Any) -> Any:
        return keras.random.normal(shape, seed=self.seed_generator)

    def call(self, mean: Any, log_variance: Any) -> Any:
        divergence = ops.exp(log_variance) + ops.square(mean) - 1.0 - log_variance
        self.add_loss(0.05 * ops.mean(ops.sum(divergence, axis=-1)))
        return mean + ops.exp(0.5 * log_variance) * self.noise(ops.shape(mean))


class RawSampling(Sampling):
    """Samples with TensorFlow's own function."""

    def noise(self, shape: Any) -> Any:
        import tensorflow as tf

        return tf.random.normal(shape)


def variational(sampling: type[Sampling] = Sampling) -> keras.Model:
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    code = sampling()(layers.Dense(2)(hidden), layers.Dense(2)(hidden))
    outputs = layers.Dense(6)(layers.Dense(5, activation="tanh")(code))
    return compiled(keras.Model(inputs, outputs), loss="mse", metrics=["mae"])


class Quantizer(layers.Layer):
    """The nearest of some learned codes, passing gradients straight through."""

    def build(self, shape: Any) -> None:
        self.codes = self.add_weight(shape=(4, shape[-1]), initializer="uniform")

    def call(self, x: Any) -> Any:
        distances = ops.sum(ops.square(x[:, None] - self.codes), axis=-1)
        code = ops.take(self.codes, ops.argmin(distances, axis=-1), axis=0)
        self.add_loss(ops.mean(ops.square(ops.stop_gradient(x) - code)))
        self.add_loss(0.25 * ops.mean(ops.square(x - ops.stop_gradient(code))))
        return x + ops.stop_gradient(code - x)


def quantized() -> keras.Model:
    stack = [layers.Dense(3), Quantizer(), layers.Dense(6)]
    return compiled(
        keras.Sequential([keras.Input((6,)), *stack]), loss="mse", metrics=[]
    )


class Router(layers.Layer):
    """Sends each token to one of several experts and balances their load."""

    def __init__(self, experts: int, units: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate = layers.Dense(experts)
        self.experts = [layers.Dense(units, activation="relu") for _ in range(experts)]
        # Plain Keras on JAX updates no metrics in `call()`.
        self.load = keras.metrics.Mean(name="load") if BACKEND != "jax" else None

    def call(self, x: Any) -> Any:
        probabilities = ops.softmax(self.gate(x), axis=-1)
        chosen = ops.one_hot(ops.argmax(probabilities, axis=-1), self.num_experts)
        tokens, shares = (ops.mean(t, axis=(0, 1)) for t in (chosen, probabilities))
        self.add_loss(0.1 * self.num_experts * ops.sum(tokens * shares))
        if self.load is not None:
            self.load.update_state(ops.max(ops.stop_gradient(tokens)))
        outputs = ops.stack([expert(x) for expert in self.experts], axis=-2)
        return ops.sum(outputs * (chosen * probabilities)[..., None], axis=-2)


def switch_transformer() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(WORDS, 4)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    x = layers.LayerNormalization()(x + Router(3, 4)(x))
    x = layers.GlobalAveragePooling1D()(x)
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def transformer() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(WORDS, 4)(inputs)
    for seed in (1, 3):
        attention = layers.MultiHeadAttention(2, 2, dropout=0.2, seed=seed)
        x = layers.LayerNormalization()(x + attention(x, x, use_causal_mask=True))
        y = layers.Dense(4)(layers.Dense(8, activation="gelu")(x))
        x = layers.LayerNormalization()(x + layers.Dropout(0.2, seed=seed + 1)(y))
    # The next token at each position.
    return compiled(keras.Model(inputs, layers.Dense(WORDS)(x)))


def text_classifier() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(WORDS, 4, mask_zero=True)(inputs)
    x = layers.Dense(4, activation="relu")(layers.GlobalAveragePooling1D()(x))
    outputs = layers.Dense(1, activation="sigmoid")(x)
    model = keras.Model(inputs, outputs)
    return compiled(model, loss="binary_crossentropy")


def bidirectional() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(WORDS, 4, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.Bidirectional(layers.LSTM(3))(x)
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def tagger() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(WORDS, 4, mask_zero=True)(inputs)
    x = layers.GRU(4, return_sequences=True)(x)
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def u_net() -> keras.Model:
    """A class for each pixel."""

    def block(x: Any, filters: int) -> Any:
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))

    inputs = keras.Input((8, 8, 3))
    high = block(inputs, 3)
    low = block(layers.MaxPooling2D()(high), 4)
    x = layers.Conv2DTranspose(3, 2, strides=2)(low)
    x = block(layers.Concatenate()([x, high]), 3)
    return compiled(keras.Model(inputs, layers.Conv2D(CLASSES, 1)(x)))


def autoencoder() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(x)
    model = keras.Model(inputs, layers.Conv2D(3, 3, padding="same")(x))
    return compiled(model, loss="mse", metrics=["mae"])


def mobile_net() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    for filters, stride in ((4, 1), (6, 2)):
        x = layers.DepthwiseConv2D(3, strides=stride, padding="same")(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.8)(x))
        x = layers.Conv2D(filters, 1, use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def vision_transformer() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((4, 4))(layers.Conv2D(4, 4, strides=4)(inputs))
    for seed in (1, 2):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(2, 2)(y, y)
        x = x + DropPath(0.3, seed=seed)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def siamese() -> keras.Model:
    """Whether two inputs belong together, by one encoder."""
    inputs = [keras.Input((4,), name=name) for name in ("first", "second")]
    encoder = keras.Sequential([layers.Dense(4, activation="tanh"), layers.Dense(3)])
    first, second = map(encoder, inputs)
    distance = ops.sum(ops.square(first - second), axis=-1, keepdims=True)
    model = keras.Model(inputs, layers.Dense(1)(distance))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return compiled(model, loss=loss)


def recommender() -> keras.Model:
    """Ratings of items by users."""
    inputs = {
        name: keras.Input((), dtype="int32", name=name) for name in ("user", "item")
    }
    vectors = [layers.Embedding(7, 4)(i) for i in inputs.values()]
    biases = [layers.Embedding(7, 1)(i) for i in inputs.values()]
    outputs = layers.Dot(axes=-1)(vectors) + layers.Add()(biases)
    return compiled(keras.Model(inputs, outputs), loss="mse", metrics=["mae"])


def two_outputs() -> keras.Model:
    inputs = keras.Input((4,))
    x = layers.Dense(6, activation="tanh")(inputs)
    outputs = {
        "kind": layers.Dense(CLASSES, name="kind")(x),
        "size": layers.Dense(1, name="size")(x),
    }
    losses = {
        "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "size": "huber",
    }
    return compiled(
        keras.Model(inputs, outputs),
        loss=losses,
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": "accuracy", "size": "mae"},
    )


class Subclassed(keras.Model):
    """Builds itself at the first batch, from layers, a loop and a submodel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(4, activation="tanh") for _ in range(2)]
        self.norm = layers.BatchNormalization(momentum=0.8)
        self.head = keras.Sequential([layers.Dense(4), layers.Dense(CLASSES)])

    def call(self, x: Any, training: bool = False) -> Any:
        for block in self.blocks:
            x = x + block(x)
        x = ops.relu(self.norm(x, training=training))
        return self.head(ops.mean(x, axis=1))


def probabilities() -> keras.Model:
    """Two outputs whose losses Keras may compute from the logits behind them."""
    inputs = keras.Input((4,))
    softmax = layers.Dense(CLASSES, activation="softmax", name="softmax")
    sigmoid = layers.Dense(2, activation="sigmoid", name="sigmoid")
    return compiled(
        keras.Model(inputs, [softmax(inputs), sigmoid(inputs)]),
        loss=["sparse_categorical_crossentropy", "binary_crossentropy"],
        metrics=[["accuracy"], ["accuracy"]],
    )


def weighted() -> keras.Model:
    stack = [layers.Dense(4, activation="relu"), layers.Dense(CLASSES)]
    return compiled(
        keras.Sequential([keras.Input((4,)), *stack]), weighted_metrics=["accuracy"]
    )


def of_policy(policy: str) -> keras.Model:
    keras.config.set_dtype_policy(policy)
    try:
        x = inputs = keras.Input((8, 8, 3))
        x = layers.BatchNormalization(momentum=0.8)(layers.Conv2D(4, 3)(x))
        x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
        return compiled(keras.Model(inputs, layers.Dense(CLASSES, dtype="float32")(x)))
    finally:
        keras.config.set_dtype_policy("float32")


IMAGES = normal(8, 8, 3)
TOKENS = integers(6, high=WORDS)
# Sequences of different lengths.
PADDED = TOKENS * (TOKENS.cumsum(axis=1) < 25)

# In mixed precision each of 12 steps rounds gradients below one to 8 or 11 bits.
MODELS: dict[str, Network] = {
    "variational autoencoder": Network(variational, (normal(6), normal(6)), draws=True),
    "quantized autoencoder": Network(quantized, (normal(6), normal(6))),
    "switch transformer": Network(switch_transformer, (TOKENS, classes()), mixes=True),
    "transformer": Network(transformer, (TOKENS, integers(6, high=WORDS)), draws=True),
    "text classifier": Network(text_classifier, (PADDED, classes()[:, None] % 2)),
    "bidirectional LSTM": Network(bidirectional, (PADDED, classes())),
    "tagger": Network(tagger, (PADDED, integers(6, high=CLASSES))),
    "U-Net": Network(u_net, (IMAGES, integers(8, 8, high=CLASSES)), mixes=True),
    "autoencoder": Network(autoencoder, (IMAGES, IMAGES)),
    "MobileNet": Network(mobile_net, (IMAGES, classes()), mixes=True),
    "vision transformer": Network(vision_transformer, (IMAGES, classes()), draws=True),
    "siamese": Network(
        siamese, ((normal(4), normal(2, 2).reshape(-1, 4)), classes()[:, None] % 2)
    ),
    "recommender": Network(
        recommender,
        (
            {"user": integers(high=7), "item": integers(2, high=7)[:, 0]},
            normal(1),
        ),
    ),
    "two outputs": Network(
        two_outputs, (normal(4), {"kind": classes(), "size": normal(1)})
    ),
    "subclassed": Network(
        lambda: compiled(Subclassed()), (normal(5, 4), classes()), mixes=True
    ),
    "probabilities": Network(
        probabilities, (normal(4), (classes(), integers(2, high=2)))
    ),
    "sample weights": Network(weighted, (normal(4), classes(), abs(normal()) + 0.1)),
    "mixed_bfloat16": Network(
        lambda: of_policy("mixed_bfloat16"),
        (IMAGES, classes()),
        mixes=True,
        atol=12 * RATE * 2.0**-8,
    ),
    "mixed_float16": Network(
        lambda: of_policy("mixed_float16"),
        (IMAGES, classes()),
        mixes=True,
        atol=12 * RATE * 2.0**-11,
    ),
}
if BACKEND == "tensorflow":
    MODELS["variational autoencoder of raw draws"] = Network(
        lambda: variational(RawSampling), (normal(6), normal(6)), draws=True
    )
