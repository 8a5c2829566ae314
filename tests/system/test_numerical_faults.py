"""Across modules: infinite losses, overflows and logits of ten thousand."""

import math
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.divergences import bernoulli
from tests.support.divergences import categorical
from tests.support.divergences import log_softmax
from tests.support.divergences import rounding
from tests.support.faults import LOGITS
from tests.support.faults import Scaled
from tests.support.faults import infinite_at
from tests.support.faults import linear_classifier
from tests.support.faults import normal_data
from tests.support.gradients import value_and_gradients
from tests.support.matrix import rest


class Counter(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts batches, and keeps the loss after each."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, {}),
        *rest(
            pytest.param(0, {}),
            pytest.param(2, {"scheme": "rpr"}),
            pytest.param(2, {"interval": 3}),
        ),
    ],
    ids=str,
)
def test_terminate_on_nan_stops_where_it_does_in_keras(
    step: int, options: dict[str, Any]
) -> None:
    def losses(model: Any) -> list[float]:
        counter = Counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.fit(
                *infinite_at(step),
                batch_size=8,
                epochs=2,
                shuffle=False,
                verbose=0,
                callbacks=[keras.callbacks.TerminateOnNaN(), counter],
            )
        return counter.losses

    plain = losses(linear_classifier())
    wrapped = losses(keras_nrs.wrap(linear_classifier(), eps=0.3, **options))
    assert len(plain) == len(wrapped) == step + 1
    assert not math.isfinite(wrapped[-1])
    assert all(map(math.isfinite, wrapped[:-1]))


# Overflows of float16.


@pytest.mark.parametrize(
    "options",
    [{}, *rest({"memory_efficient": True}, {"interval": 2})],
    ids=str,
)
def test_an_overflow_of_the_perturbed_pass_is_skipped(options: dict[str, Any]) -> None:
    """delta of 1e5 is beyond float16, which ends at 65504; theta is not."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(3)]
        )
        nrs = keras_nrs.wrap(model, eps=1e5, perturbation=Scaled(), **options)
        nrs.compile(keras.optimizers.SGD(0.1), LOGITS)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = nrs.optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    x, y = normal_data(8)
    before = numpy_values(model.trainable_variables)
    logs = nrs.train_on_batch(x, y, return_dict=True)
    assert not math.isfinite(logs["perturbed_loss"])
    assert_equal(numpy_values(model.trainable_variables), before)
    scale = float(ops.convert_to_numpy(optimizer.dynamic_scale))
    assert scale == optimizer.initial_scale / 2
    assert int(optimizer.inner_optimizer.iterations) == 0
    # With an eps that float16 can hold the next step is made, at the same scale.
    nrs.eps = 0.1
    nrs.reset_metrics()
    logs = nrs.train_on_batch(x, y, return_dict=True)
    assert math.isfinite(logs["loss"])
    assert int(optimizer.inner_optimizer.iterations) == 1
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) == scale
    after = numpy_values(model.trainable_variables)
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(np.isfinite(w).all() for w in after)


@pytest.mark.parametrize("num_groups", [1, *rest(2)])
def test_an_overflow_of_the_ascent_is_skipped(num_groups: int) -> None:
    """The loss times 2**30 overflows in the gradient alone: the loss is finite."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**30
    )
    model.compile(optimizer, LOGITS)
    nrs = keras_nrs.wrap(model, scheme="sam", perturbations_per_replica=num_groups)
    x, y = normal_data(8)
    before = numpy_values(model.trainable_variables)
    plain = float(model.test_on_batch(x, y, return_dict=True)["loss"])
    nrs.reset_metrics()
    # Without a delta, and in float16.
    logs = nrs.train_on_batch(x, y, return_dict=True)
    assert logs["loss"] == pytest.approx(plain, rel=2**-10)
    assert_equal(numpy_values(model.trainable_variables), before)
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) == 2.0**29


# Large logits.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("divergence", "reference", "num_terms"),
    [
        (
            CategoricalKL(from_logits=True, reduction=None),
            lambda p, q: categorical(log_softmax(p), log_softmax(q)),
            5,
        ),
        (BernoulliKL(from_logits=True, reduction=None), bernoulli, 2),
    ],
    ids=["categorical", "bernoulli"],
)
def test_logits_of_ten_thousand(
    divergence: Divergence, reference: Any, num_terms: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # As float32 has them, for the reference too.
    p, q = rng.uniform(-1e4, 1e4, (2, 50, 5)).astype("float32").astype("float64")
    tensors = [ops.convert_to_tensor(r, "float32") for r in (p, q)]
    value = ops.convert_to_numpy(divergence(*tensors))
    expected = reference(p, q)
    assert expected.max() > 1e3
    np.testing.assert_allclose(value, expected, rtol=0, atol=rounding(p, q, num_terms))
    _, gradients = value_and_gradients(
        lambda *outputs: ops.sum(divergence(*outputs)), tensors
    )
    assert all(np.isfinite(g).all() for g in gradients)


def step_of_linear_model(
    activation: str, loss: Any, x: np.ndarray, y: np.ndarray, kernel: np.ndarray
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Logs and weights after a step whose delta is 1, -1, 1, ... in the kernel."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation)])
    model.compile(keras.optimizers.SGD(1e-3), loss)
    model.set_weights([kernel, np.zeros(3)])
    only_kernel = Scaled(where=lambda v: "kernel" in v.path)
    nrs = keras_nrs.wrap(model, eps=1.0, perturbation=only_kernel)
    logs = nrs.train_on_batch(x, y, return_dict=True)
    logs = {name: float(value) for name, value in logs.items()}
    return logs, numpy_values(model.trainable_variables)


def test_a_step_with_logits_of_ten_thousand() -> None:
    """Inputs are one-hot, so that logits are rows of the kernel, without rounding."""
    x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    kernel = np.random.default_rng(0).integers(-9999, 9999, (4, 3)).astype("float32")
    logs, weights = step_of_linear_model("linear", LOGITS, x, y, kernel)
    signs = np.where(np.arange(12) % 2, -1.0, 1.0).reshape(4, 3)
    p, q = kernel.astype("float64"), kernel + signs
    expected = np.mean(categorical(log_softmax(p), log_softmax(q)))
    assert logs["model_divergence"] == pytest.approx(expected, abs=rounding(p, q, 3))
    # Of a cross-entropy: a log-probability, off by 4 M + C + 8 units in the last place.
    atol = 2.0**-24 * (4 * 1e4 + 3 + 8)
    expected = np.mean(-log_softmax(q)[np.arange(4), y])
    assert logs["perturbed_loss"] == pytest.approx(expected, abs=atol)
    assert all(np.isfinite(w).all() for w in weights)


# Probabilities of exactly 0 and 1.


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        ("softmax", "sparse_categorical_crossentropy"),
        ("sigmoid", "binary_crossentropy"),
        *rest(
            pytest.param("softmax", "categorical_crossentropy"),
            pytest.param("softmax", "kl_divergence"),
        ),
    ],
)
def test_a_step_with_certain_probabilities(activation: str, loss: str) -> None:
    """With logits of -200 and 200: exp(-104) is 0 in float32."""
    x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    signs = np.where(np.arange(12) % 2, -1.0, 1.0).reshape(4, 3)
    kernel = (-200.0 * signs).astype("float32")
    labels = y if loss.startswith("sparse") else np.eye(3, dtype="float32")[y]
    outputs = ops.convert_to_numpy(getattr(keras.activations, activation)(kernel))
    assert 0.0 in outputs
    assert activation == "softmax" or 1.0 in outputs
    logs, weights = step_of_linear_model(activation, loss, x, labels, kernel)
    assert all(math.isfinite(value) for value in logs.values())
    assert all(np.isfinite(w).all() for w in weights)


def clipped(p: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities as Keras's losses clip them, normalized again."""
    return log_softmax(np.log(np.clip(p, np.float32(1e-7), 1.0)))


def test_zero_classes_in_softmax_outputs() -> None:
    """All pairs of rows with zeros, ones and what is between."""
    rows = np.array(
        [
            [1, 0, 0, 0],
            [0, 1, 0, 0],
            [0, 0, 0.5, 0.5],
            [0.25, 0.25, 0.25, 0.25],
            [0, 0.125, 0.875, 0],
        ]
    )
    p, q = (r.reshape(-1, 4) for r in np.broadcast_arrays(rows[:, None], rows))
    tensors = [ops.convert_to_tensor(r, "float32") for r in (p, q)]
    kl = CategoricalKL(reduction=None)
    log_p, log_q = clipped(p), clipped(q)
    # The inputs are exact; their logarithms, up to 16.2, are off by as much as logits
    # of that size.
    np.testing.assert_allclose(
        ops.convert_to_numpy(kl(*tensors)),
        categorical(log_p, log_q),
        rtol=0,
        atol=2 * rounding(log_p, log_q, 4),
    )
    _, gradients = value_and_gradients(lambda *outputs: ops.sum(kl(*outputs)), tensors)
    assert all(np.isfinite(g).all() for g in gradients)
    assert any(np.any(g != 0) for g in gradients)
