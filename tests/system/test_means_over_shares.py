"""Across modules: the terms are those of the whole batch, in whatever shares it runs.

The reference is plain Keras in the same setting.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from tests.support.arrays import ROUNDING
from tests.support.matrix import rest
from tests.support.perturbations import FixedPerturbation
from tests.support.replicas import devices

# 8 padded sequences of 1 to 6 tokens: shares of the batch have other numbers of tokens.
LENGTHS = np.array([1, 6, 5, 6, 1, 2, 1, 1])
TOKENS = np.where(
    np.arange(6) < LENGTHS[:, None], 1 + np.arange(48).reshape(8, 6) % 7, 0
)
LABELS = TOKENS % 3
WEIGHTS = np.linspace(0.1, 3.0, 8).astype("float32")

CE = keras.losses.SparseCategoricalCrossentropy


def sum_of_squares(y_true: Any, y_pred: Any) -> Any:
    """A loss function that returns one number, which is no mean."""
    return ops.sum(ops.square(y_pred - ops.cast(y_true, y_pred.dtype)[..., None]))


class AddsSum(layers.Layer):
    """Adds a sum over the samples, a mean, and a loss for each sample."""

    def call(self, x: Any) -> Any:
        squares = ops.mean(ops.square(x), axis=(1, 2))
        self.add_loss(0.1 * ops.sum(squares))
        self.add_loss(ops.mean(squares))
        self.add_loss(0.1 * squares)
        return x


class Masked(keras.losses.Loss):
    """A loss with a mask of its own, as keras.io's translation example has."""

    def __init__(self) -> None:
        super().__init__()
        self.entropy = CE(from_logits=True, reduction="none")

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = ops.cast(y_true != 0, y_pred.dtype)
        return ops.sum(self.entropy(y_true, y_pred) * mask) / ops.sum(mask)


# Loss, whether tokens are masked, whether samples are weighted, whether a layer adds.
CASES: dict[str, tuple[Callable[[], Any], bool, bool, bool]] = {
    "mask": (lambda: CE(from_logits=True), True, False, False),
    "mask and weights": (lambda: CE(from_logits=True), True, True, False),
    "ignore_class": (lambda: CE(from_logits=True, ignore_class=0), False, False, False),
    "mean_with_sample_weight": (
        lambda: CE(from_logits=True, reduction="mean_with_sample_weight"),
        True,
        True,
        False,
    ),
    "sum": (lambda: CE(from_logits=True, reduction="sum"), True, True, False),
    "function": (lambda: sum_of_squares, False, False, False),
    "own mask": (Masked, False, False, False),
    "add_loss": (lambda: CE(from_logits=True), False, False, True),
}
CASES_BUT_MASK = [case for case in CASES if case != "mask"]
SHARES = ["groups", *(["devices"] if keras.config.backend() == "jax" else [])]


def network(case: str) -> keras.Model:
    make_loss, masks, _, adds = CASES[case]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(8, 4, mask_zero=masks),
            *([AddsSum()] if adds else []),
            layers.Dense(3),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), make_loss())
    return model


def train(model: Any, case: str, num_devices: int = 1) -> dict[str, float]:
    _, _, is_weighted, _ = CASES[case]
    weights = np.tile(WEIGHTS[:, None], 6) if is_weighted else None
    with devices(num_devices) if num_devices > 1 else nullcontext():
        logs = model.fit(
            TOKENS, LABELS, sample_weight=weights, batch_size=8, verbose=0
        ).history
    return {name: values[0] for name, values in logs.items()}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", ["mask", *rest(*CASES_BUT_MASK)])
def test_the_step_is_that_of_plain_keras(case: str, share: str) -> None:
    plain, model = network(case), network(case)
    expected = train(plain, case)["loss"]
    num_devices = 2 if share == "devices" else 1
    with devices(2) if num_devices > 1 else nullcontext():
        model = network(case)
        nrs = keras_nrs.wrap(
            model,
            eps=0.0,
            alpha=1.0,
            normalize=True,
            divergence=keras_nrs.divergences.CategoricalKL(from_logits=True),
            perturbations_per_replica=2 if share == "groups" else 1,
        )
    logs = train(nrs, case, num_devices)
    # Sums of 50 terms, in another order.
    bound = 50 * ROUNDING
    assert logs["loss"] == pytest.approx(expected, rel=bound)
    assert logs["perturbed_loss"] == pytest.approx(expected, rel=bound)
    assert logs["model_divergence"] == pytest.approx(0, abs=1e-6)
    for a, b in zip(plain.variables, model.variables, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=bound, atol=bound
        )


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_a_share_of_the_batch_estimates_the_terms_without_bias(case: str) -> None:
    """Over many steps without learning, their means are those of the whole batch."""
    _, _, is_weighted, _ = CASES[case]
    weights = np.tile(WEIGHTS[:, None], 6) if is_weighted else None

    def logs(steps: int, **kwargs: Any) -> dict[str, np.ndarray]:
        model = network(case)
        model.optimizer.learning_rate = 0.0
        nrs = keras_nrs.wrap(
            model,
            eps=0.3,
            perturbation=FixedPerturbation(),
            divergence=keras_nrs.divergences.CategoricalKL(from_logits=True),
            seed=3,
            **kwargs,
        )
        logs: list[dict[str, Any]] = []
        for _ in range(steps):
            nrs.reset_metrics()
            logs.append(nrs.train_on_batch(TOKENS, LABELS, weights, return_dict=True))
        return {name: np.array([float(log[name]) for log in logs]) for name in logs[0]}

    whole = logs(1)
    shares = logs(100, perturbed_fraction=0.5)
    for name in ("model_divergence", "perturbed_loss", "loss"):
        values = shares[name]
        assert np.std(values) > 1e-3 * abs(np.mean(values))
        error = np.std(values) / np.sqrt(len(values))
        # 24 means: a chance of 2e-3 for a false alarm, with a fixed seed.
        assert abs(np.mean(values) - whole[name][0]) < 4 * error, name


@pytest.mark.matrix
def test_a_loss_that_compares_samples_has_no_share() -> None:
    def spread(y_true: Any, y_pred: Any) -> Any:
        return ops.var(ops.mean(y_pred, axis=(1, 2)))

    model = network("function")
    model.compile("sgd", spread)
    divergence = keras_nrs.divergences.CategoricalKL(from_logits=True)
    nrs = keras_nrs.wrap(model, divergence=divergence, perturbed_fraction=0.5)
    with pytest.raises(ValueError, match="`perturbed_fraction` must be 1 with a loss"):
        nrs.train_on_batch(TOKENS, LABELS)


@pytest.mark.parametrize("size", [2, *rest(8)])
def test_logs_have_the_mean_divergence_of_a_loss_that_is_a_sum(size: int) -> None:
    def divergence(case: str) -> float:
        nrs = keras_nrs.wrap(network(case), eps=0.3, perturbation=FixedPerturbation())
        logs = nrs.train_on_batch(TOKENS[:size], LABELS[:size], return_dict=True)
        return float(logs["model_divergence"])

    assert divergence("sum") == pytest.approx(divergence("mask"), rel=1e-5)
