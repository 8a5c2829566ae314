"""Random networks, losses, optimizers, options and data: what must always hold.

The suite runs a few cases, always the same ones. For more, at random:

    KERAS_NRS_FUZZ_EXAMPLES=500 python -m pytest -m slow tests/system/test_fuzz.py
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs import perturbations
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values

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
    perturbations_per_replica: int = 1

    def arguments(self) -> dict[str, Any]:
        kinds = {
            "ball": perturbations.Ball,
            "relative": perturbations.RelativeBall,
            "layerwise": perturbations.LayerwiseBall,
            "released": perturbations.ReleasedCode,
        }
        arguments = dataclasses.asdict(self)
        radius, noise = arguments.pop("radius"), arguments.pop("noise")
        shape = {"noise": noise} | ({"radius": radius} if radius else {})
        arguments["perturbation"] = kinds[self.perturbation](**shape)
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
        return not stateful & set(self.blocks) and self.source != "masked_tokens"

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


# What is checked.


def trained(case: Case, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model after two steps, and the history; wrapped if there are options."""
    keras.utils.set_random_seed(1)
    model = make_model(case)
    if options:
        model = keras_nrs.wrap(model, seed=2, **options)
    keras.utils.set_random_seed(3)
    arguments = fit_arguments(case, make_batches(case))
    history = model.fit(**arguments, shuffle=False, verbose=0)
    return model, history.history


def values(model: Any) -> list[np.ndarray]:
    return numpy_values(model.variables + model.optimizer.variables)


def check_baseline_is_bare_keras(case: Case, bare: Any, history: Any) -> None:
    """Bit for bit: weights, random states, optimizer and history."""
    baseline, own_history = trained(
        case, **case.options.arguments() | {"scheme": "baseline"}
    )
    assert_equal(values(baseline.base_model), values(bare))
    assert own_history == history


def check_saving(case: Case, nrs: Any, batch: Any) -> None:
    """A saved model is the same."""
    # Keras does not save the dtype of a Sequential model, which has no effect.
    keeps_dtype = case.policy == "float32" or "nested" not in case.blocks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nrs.keras"
        nrs.save(path)
        loaded = keras.saving.load_model(path)
    assert_equal(values(loaded), values(nrs))
    # As JSON: a file has no tuples.
    configs = [[m.get_config(), m.get_compile_config()] for m in (nrs, loaded)]
    if not keeps_dtype:
        for config, _ in configs:
            del config["base_model"]
    first, second = map(json.dumps, configs)
    assert first == second
    predictions = [
        keras.tree.map_structure(ops.convert_to_numpy, m(batch[0], training=False))
        for m in (nrs, loaded)
    ]
    keras.tree.assert_same_structure(*predictions)
    assert_equal(*map(keras.tree.flatten, predictions))


def penalties_of(model: Any, x: Any) -> float:
    """The sum of the layers' own losses at the next step."""
    keras.utils.set_random_seed(4)  # Of PyTorch, of which unseeded dropout draws.
    trainable = [v.value for v in model.trainable_variables]
    state = [ops.copy(v.value) for v in model.non_trainable_variables]
    _, _, losses = model.stateless_call(
        trainable, state, x, training=True, return_losses=True
    )
    return float(sum(float(ops.convert_to_numpy(loss)) for loss in losses))


def bare_loss(bare: Any, model: Any, batch: Any) -> float:
    """L(theta), penalties included, as Keras computes it at the next step."""
    for own, other in zip(bare.variables, model.variables, strict=True):
        own.assign(ops.convert_to_numpy(other))
    keras.utils.set_random_seed(4)
    bare.reset_metrics()
    return float(bare.train_on_batch(*batch, return_dict=True)["loss"])


def check_terms(case: Case, bare: Any, nrs: Any, batch: Any, eps: float) -> None:
    """Of a perturbed step: the loss is what Equation 3 says, of the terms reported."""
    options = case.options
    nrs.eps = eps
    seed, _ = numpy_values([nrs.seed_generator.state])[0]
    nrs.seed_generator.state.assign([seed, 0])  # A step on `interval`'s schedule.
    penalty = penalties_of(nrs.base_model, batch[0])
    clean = bare_loss(bare, nrs.base_model, batch) - penalty
    keras.utils.set_random_seed(4)
    nrs.reset_metrics()
    logs = nrs.train_on_batch(*batch, return_dict=True)
    total = float(logs["loss"])
    divergence = float(logs["model_divergence"])
    perturbed = float(logs["perturbed_loss"])
    scale = 1 + max(
        abs(term)
        for term in (clean, penalty, options.alpha * divergence, perturbed, total)
    )
    # A thousand roundings of float32, and some of bfloat16, of the largest term.
    is_float32 = case.policy == "float32"
    bound = scale * (1000 * 2.0**-24 if is_float32 else 16 * 2.0**-9)
    # Where groups have other masks, the penalty on activities cannot be known.
    penalty_is_known = case.clean_pass_is_bare or "activity" not in case.blocks
    is_perturbed = options.scheme == "rpr" or options.alpha > 0 or options.beta > 0
    if not is_perturbed:
        assert divergence == perturbed == 0
    if options.scheme == "rpr":
        if penalty_is_known:
            assert total == pytest.approx(perturbed + penalty, abs=bound)
    else:
        regularizers = options.alpha * divergence + options.beta * perturbed
        factor = 1 + options.beta if options.normalize else 1
        if case.clean_pass_is_bare:
            expected = penalty + (clean + regularizers) / factor
            assert total == pytest.approx(expected, abs=bound)
        # What is left of the total is L(theta), in whatever groups.
        clean = factor * (total - penalty) - regularizers
    if eps == 0 and is_perturbed:
        check_nothing_perturbed(case, divergence, perturbed, clean, bound)


def check_nothing_perturbed(
    case: Case, divergence: float, perturbed: float, clean: float, bound: float
) -> None:
    options = case.options
    assert divergence == pytest.approx(
        0, abs=bound if case.policy != "float32" else 1e-6
    )
    is_whole = options.perturbed_fraction == 1
    clean_is_known = case.clean_pass_is_bare or (
        options.scheme == "nrs" and "activity" not in case.blocks
    )
    if is_whole and clean_is_known:
        assert perturbed == pytest.approx(clean, abs=(2 + options.beta) * bound)


def check(case: Case) -> None:
    batches = make_batches(case)
    bare, history = trained(case)
    check_baseline_is_bare_keras(case, bare, history)
    nrs, _ = trained(case, **case.options.arguments())
    assert all(np.isfinite(value).all() for value in values(nrs))
    check_saving(case, nrs, batches[0])
    for eps in (case.options.eps, 0.0):
        check_terms(case, bare, nrs, batches[0], eps)


BLOCKS = [
    *["dense", "conv", "batch_norm", "layer_norm", "dropout", "unseeded_dropout"],
    *["noise", "attention", "gru", "lstm", "shared", "penalty", "activity", "frozen"],
    *["constrained", "prelu", "nested"],
]
LOSSES = ["sparse", "softmax", "focal", "binary", "sigmoid", "mse", "huber"]
LOSSES += ["log_cosh", "sum"]
# Not Adafactor: Keras's gives NaN where most of a gradient is exactly 0.
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw", "rmsprop", "lion", "adagrad"]
OPTIMIZERS += ["accumulating"]
# Radii of about a third of the weights' norm.
EPS = {"ball": 1.0, "relative": 0.3, "layerwise": 0.2, "released": 0.1}


@st.composite
def all_options(draw: Any) -> Options:
    perturbation = draw(st.sampled_from(sorted(EPS)))
    radii = [None, *perturbations.RADII]
    coefficients = st.sampled_from([1.0, 0.0, 0.5, 3.0])
    return Options(
        scheme=draw(st.sampled_from(["nrs", "nrs", "rpr"])),
        perturbation=perturbation,
        radius=draw(st.sampled_from(radii)),
        noise=draw(st.sampled_from(perturbations.NOISES)),
        eps=EPS[perturbation],
        alpha=draw(coefficients),
        beta=draw(coefficients),
        interval=draw(st.sampled_from([1, 1, 2, 3])),
        normalize=draw(st.booleans()),
        perturbed_fraction=draw(st.sampled_from([1.0, 1.0, 0.5, 0.2])),
        memory_efficient=draw(st.booleans()),
        perturbations_per_replica=draw(st.sampled_from([1, 1, 2, 5])),
    )


FORMATS = ["arrays", "generator", "PyDataset", "tf.data", "DataLoader"]
IS_JAX = keras.config.backend() == "jax"
CASES = st.builds(
    Case,
    source=st.sampled_from(["vector", "image", "sequence", "tokens", "masked_tokens"]),
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=3).map(tuple),
    heads=st.lists(st.sampled_from(LOSSES), min_size=1, max_size=2).map(tuple),
    pooled=st.booleans(),
    structure=st.sampled_from(["list", "dict"]),
    second_input=st.booleans(),
    optimizer=st.sampled_from(OPTIMIZERS),
    policy=st.sampled_from(["float32", "mixed_bfloat16"]),
    # JAX compiles each operation, which takes much longer than a step.
    run_eagerly=st.sampled_from([False] * (9 if IS_JAX else 1) + [True]),
    data=st.sampled_from(FORMATS),
    sizes=st.sampled_from([(4, 4), (5, 3), (3, 1)]),
    weighted=st.booleans(),
    options=all_options(),
)
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
# With a random eps it may well be inert.
ignore_inert_eps = pytest.mark.filterwarnings("ignore:eps=:UserWarning")


# What failed once: groups after the first had other masks in the clean pass.
UNSEEDED = Case(
    blocks=("unseeded_dropout",),
    options=Options(perturbations_per_replica=2, perturbed_fraction=0.5),
)
# Compiling takes most of the time, and much more of it than running on PyTorch.
FEW = {"jax": 2, "tensorflow": 4, "torch": 40}[keras.config.backend()]


@ignore_inert_eps
@settings(max_examples=FEW, derandomize=True, **COMMON)
@given(CASES)
@example(UNSEEDED)
def test_what_must_always_hold(case: Case) -> None:
    check(case)


@pytest.mark.slow
@ignore_inert_eps
@settings(max_examples=int(os.environ.get("KERAS_NRS_FUZZ_EXAMPLES", "300")), **COMMON)
@given(CASES)
def test_what_must_hold_in_many_more_cases(case: Case) -> None:
    check(case)
    keras.utils.clear_session(free_memory=True)
