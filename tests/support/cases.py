"""Random networks, losses, optimizers, options and data."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_nrs import perturbations

POSITIONS = 4
CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of `wrap()`."""

    scheme: str = "nrs"
    perturbation: str = "relative"
    radius: str | None = None
    noise: str = "normal"
    eps: float = 0.3
    alpha: float = 1.0
    beta: float = 1.0
    interval: int = 1
    normalize: bool = False
    perturbed_fraction: float = 1.0
    memory_efficient: bool = False
    clean_pass: bool = False
    perturbations_per_replica: int = 1

    def arguments(self) -> dict[str, Any]:
        kind = perturbations.NAMES[self.perturbation]
        arguments = dataclasses.asdict(self)
        radius, noise = arguments.pop("radius"), arguments.pop("noise")
        shape = {"noise": noise}
        if radius and hasattr(kind, "default_radius"):
            shape["radius"] = radius
        arguments["perturbation"] = kind(**shape)
        return arguments


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, how it is compiled, what it is trained on, and how it is wrapped."""

    source: str = "vector"
    blocks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("sparse",)
    pooled: bool = True
    structure: str = "list"
    second_input: bool = False
    optimizer: str = "sgd"
    policy: str = "float32"
    run_eagerly: bool = False
    data: str = "arrays"
    sizes: tuple[int, int] = (4, 4)
    weighted: bool = False
    options: Options = Options()

    @property
    def is_sequence(self) -> bool:
        return self.source in ("sequence", "tokens", "masked_tokens")

    @property
    def has_positions(self) -> bool:
        return self.is_sequence and not self.pooled

    @property
    def samples_are_independent(self) -> bool:
        stateful = {"batch_norm", "dropout", "unseeded_dropout", "noise", "nested"}
        return not stateful & set(self.blocks)

    @property
    def clean_pass_is_bare(self) -> bool:
        """Whether the clean pass is on the samples together, or might as well be."""
        options = self.options
        is_whole = options.perturbed_fraction == 1
        is_whole &= options.perturbations_per_replica == 1
        return is_whole or self.samples_are_independent


# Every loss: the layer in front of it, the loss, and its labels.


def make_head(name: str, output: str) -> layers.Layer:
    units, activation = {
        "sparse": (CLASSES, None),
        "softmax": (CLASSES, "softmax"),
        "focal": (CLASSES, "softmax"),
        "binary": (2, None),
        "sigmoid": (1, "sigmoid"),
    }.get(name, (2, None))
    return layers.Dense(units, activation=activation, name=output)


def make_loss(name: str) -> keras.losses.Loss:
    return {
        "sparse": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "softmax": lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        "focal": keras.losses.CategoricalFocalCrossentropy,
        "binary": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        "sigmoid": keras.losses.BinaryCrossentropy,
        "mse": keras.losses.MeanSquaredError,
        "huber": keras.losses.Huber,
        "log_cosh": keras.losses.LogCosh,
        "sum": lambda: keras.losses.MeanSquaredError(reduction="sum"),
    }[name]()


def make_labels(name: str, shape: tuple[int, ...], rng: Any) -> np.ndarray:
    if name == "sparse":
        return rng.integers(0, CLASSES, shape).astype("int32")
    if name in ("softmax", "focal"):
        return np.eye(CLASSES, dtype="float32")[rng.integers(0, CLASSES, shape)]
    if name in ("binary", "sigmoid"):
        units = 2 if name == "binary" else 1
        return rng.integers(0, 2, (*shape, units)).astype("float32")
    return rng.normal(size=(*shape, 2)).astype("float32")


def as_sequence(x: Any) -> tuple[Any, Any]:
    """A tensor as a sequence, and how to give it its shape again."""
    shape = x.shape[1:]
    if len(shape) == 1:
        return layers.RepeatVector(2)(x), layers.GlobalAveragePooling1D()
    if len(shape) == 2:
        return x, lambda y: y
    flat = (shape[0] * shape[1], shape[2])
    return layers.Reshape(flat)(x), layers.Reshape((*shape[:2], -1))


def block(kind: str, x: Any, case: Case, index: int) -> Any:
    """One block on `x`, which keeps its shape but for the last axis."""
    features = x.shape[-1]
    if kind == "nested" and case.source == "masked_tokens":
        kind = "batch_norm"  # A Sequential warns of masks.
    if kind == "dense":
        return layers.Dense(4, activation="relu")(x)
    if kind == "conv":
        if case.source == "image":
            return layers.Conv2D(3, 2, padding="same", activation="relu")(x)
        if case.source in ("sequence", "tokens"):
            return layers.Conv1D(3, 2, padding="causal", activation="relu")(x)
        return layers.Dense(3, activation="gelu", use_bias=False)(x)
    if kind in ("attention", "gru", "lstm"):
        sequence, back = as_sequence(x)
        if kind == "attention":
            attention = layers.MultiHeadAttention(2, 2)
            return back(layers.Add()([sequence, attention(sequence, sequence)]))
        recurrent = layers.GRU if kind == "gru" else layers.LSTM
        return back(recurrent(3, return_sequences=True)(sequence))
    if kind == "shared":
        dense = layers.Dense(features, activation="tanh")
        return dense(dense(x))
    make = {
        "batch_norm": lambda: layers.BatchNormalization(momentum=0.5),
        "layer_norm": layers.LayerNormalization,
        "dropout": lambda: layers.Dropout(0.4, seed=index),
        "unseeded_dropout": lambda: layers.Dropout(0.4),
        "noise": lambda: layers.GaussianNoise(0.1, seed=index),
        "penalty": lambda: layers.Dense(3, kernel_regularizer="l2"),
        # Keras on TensorFlow cannot add a bfloat16 penalty to several losses.
        "activity": lambda: layers.ActivityRegularization(l2=0.01, dtype="float32"),
        "frozen": lambda: layers.Dense(3, trainable=False),
        "constrained": lambda: layers.Dense(3, kernel_constraint="max_norm"),
        "prelu": layers.PReLU,
        "nested": lambda: keras.Sequential(
            [layers.Dense(3), layers.BatchNormalization(), layers.ReLU()]
        ),
    }[kind]
    return make()(x)


def make_model(case: Case) -> keras.Model:
    keras.config.set_dtype_policy(case.policy)
    try:
        x = main = keras.Input(
            **{
                "vector": {"shape": (5,)},
                "image": {"shape": (4, 4, 2)},
                "sequence": {"shape": (POSITIONS, 3)},
            }.get(case.source, {"shape": (POSITIONS,), "dtype": "int32"}),
            name="main",
        )
        if case.source in ("tokens", "masked_tokens"):
            x = layers.Embedding(7, 3, mask_zero=case.source == "masked_tokens")(x)
        for index, kind in enumerate(case.blocks):
            x = block(kind, x, case, index)
        if case.source == "image":
            x = layers.GlobalAveragePooling2D()(x)
        elif case.is_sequence and case.pooled:
            x = layers.GlobalAveragePooling1D()(x)
        inputs: Any = main
        if case.second_input:
            extra = keras.Input((2,), name="extra")
            y = layers.Dense(3, activation="tanh")(extra)
            if case.has_positions:
                y = layers.RepeatVector(POSITIONS)(y)
            x = layers.Concatenate()([layers.Dense(3)(x), y])
            names = {"main": main, "extra": extra}
            inputs = names if case.structure == "dict" else [main, extra]
        outputs: Any = {
            f"head_{i}": make_head(head, f"head_{i}")(x)
            for i, head in enumerate(case.heads)
        }
        if case.structure != "dict":
            outputs = list(outputs.values())
            if len(outputs) == 1:
                (outputs,) = outputs
        model = keras.Model(inputs, outputs)
        compile_model(model, case)
    finally:
        keras.config.set_dtype_policy("float32")
    return model


def compile_model(model: keras.Model, case: Case) -> None:
    optimizers = keras.optimizers
    optimizer = {
        "sgd": lambda: optimizers.SGD(0.05),
        "nesterov": lambda: optimizers.SGD(
            0.02, momentum=0.9, nesterov=True, clipnorm=1.0
        ),
        "adam": lambda: optimizers.Adam(0.01, global_clipnorm=1.0),
        # Not `use_ema`, after which Keras on JAX cannot fit() again.
        "adamw": lambda: optimizers.AdamW(0.01),
        "rmsprop": lambda: optimizers.RMSprop(0.01, clipvalue=0.5),
        "lion": lambda: optimizers.Lion(0.001),
        "adagrad": lambda: optimizers.Adagrad(0.05),
        "accumulating": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    }[case.optimizer]()
    losses: Any = {f"head_{i}": make_loss(h) for i, h in enumerate(case.heads)}
    weights: Any = {f"head_{i}": 1.0 - 0.5 * i for i in range(len(case.heads))}
    if case.structure != "dict":
        losses, weights = list(losses.values()), list(weights.values())
        if len(losses) == 1:
            losses, weights = losses[0], None
    model.compile(optimizer, losses, loss_weights=weights, run_eagerly=case.run_eagerly)


def make_batches(case: Case) -> list[Any]:
    """Two batches: inputs, labels, and sample weights if there are any."""
    rng = np.random.default_rng(0)
    total = sum(case.sizes)
    if case.source in ("tokens", "masked_tokens"):
        main = rng.integers(0, 7, (total, POSITIONS)).astype("int32")
        main[:, 0] = 1  # Not everything is masked.
    else:
        shape = {"vector": (5,), "image": (4, 4, 2)}.get(case.source, (POSITIONS, 3))
        main = rng.normal(size=(total, *shape)).astype("float32")
    x: Any = main
    if case.second_input:
        extra = rng.normal(size=(total, 2)).astype("float32")
        x = {"main": main, "extra": extra}
        if case.structure != "dict":
            x = (main, extra)
    shape = (total, POSITIONS) if case.has_positions else (total,)
    y: Any = {
        f"head_{i}": make_labels(head, shape, rng) for i, head in enumerate(case.heads)
    }
    if case.structure != "dict":
        y = tuple(y.values())
        if len(y) == 1:
            (y,) = y
    data = (x, y)
    if case.weighted:
        weight = rng.uniform(0.5, 2.0, shape).astype("float32")
        # Keras wants weights of positions (and, on PyTorch with masks, no others) in
        # the structure of the labels.
        is_nested = case.has_positions and keras.tree.is_nested(y)
        data += (
            keras.tree.map_structure(lambda _: weight, y) if is_nested else weight,
        )
    size = case.sizes[0]
    return [
        keras.tree.map_structure(lambda t: t[:size], data),
        keras.tree.map_structure(lambda t: t[size:], data),
    ]


class Batches(keras.utils.PyDataset):
    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def fit_arguments(case: Case, batches: list[Any]) -> dict[str, Any]:
    """The batches in the format of the case."""
    joined = keras.tree.map_structure(lambda *t: np.concatenate(t), *batches)
    size = case.sizes[0]
    if case.data == "arrays":
        names = ("x", "y", "sample_weight")
        return dict(zip(names, joined, strict=False)) | {"batch_size": size}
    if case.data == "generator":

        def generate() -> Iterator[Any]:
            while True:
                yield from batches

        return {"x": generate(), "steps_per_epoch": len(batches)}
    if case.data == "PyDataset":
        return {"x": Batches(batches)}
    if case.data == "tf.data":
        import tensorflow as tf

        return {"x": tf.data.Dataset.from_tensor_slices(joined).batch(size)}
    import torch

    samples = [
        keras.tree.map_structure(lambda t, i=i: t[i], joined)
        for i in range(sum(case.sizes))
    ]

    def collate(items: list[Any]) -> Any:
        # PyTorch's own gives lists, which Keras on TensorFlow does not take.
        return keras.tree.map_structure(lambda *t: torch.tensor(np.array(t)), *items)

    loader = torch.utils.data.DataLoader(samples, size, collate_fn=collate)
    return {"x": loader}
