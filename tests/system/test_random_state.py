"""A call draws no number that the user's script would draw after it."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs import flatness
from keras_nrs import stateless
from keras_nrs.batches import Batches
from keras_nrs.flatness.loss import BatchDivergence
from keras_nrs.flatness.loss import Inputs
from keras_nrs.step.output_divergences import ChosenDivergences
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.matrix import rest
from tests.support.networks import compile_classifier

BACKEND = keras.config.backend()
X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
Y = np.arange(8) % 3


class AlwaysDropout(layers.Dropout):
    """Drops out in inference mode too, as for Monte Carlo estimates."""

    def call(self, inputs: Any, training: bool = False) -> Any:
        return super().call(inputs, training=True)


def network() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4),
            layers.BatchNormalization(),
            AlwaysDropout(0.5),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3),
        ]
    )
    compile_classifier(model, metrics=[])
    return model


def draws() -> list[float]:
    """Of each global generator, after the seed was set."""
    found = [
        random.random(),
        np.random.random(),  # noqa: NPY002
        float(keras.random.uniform(())),
    ]
    if BACKEND == "torch":
        import torch

        found.append(float(torch.rand(())))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        found.append(float(tf.random.uniform(())))
    return found


def update(model: Any, other: Any) -> None:
    values = numpy_values(model.variables)
    keras_nrs.update_batch_norm(model, X)
    for variable, value in zip(model.variables, values, strict=True):
        if variable.name.startswith("moving"):
            variable.assign(value)


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "wrap": lambda model, other: keras_nrs.wrap(model, seed=1),
    "calibrate_eps": lambda model, other: keras_nrs.calibrate_eps(
        model, X, target_divergence=0.05, num_samples=2
    ),
    "update_batch_norm": update,
    "model_divergence": lambda model, other: flatness.model_divergence(
        model, X, eps=0.1, num_samples=2
    ),
    "hessian_eigenvalues": lambda model, other: flatness.hessian_eigenvalues(
        model, X, Y
    ),
    "hessian_trace": lambda model, other: flatness.hessian_trace(
        model, X, Y, num_products=6
    ),
    "hessian_density": lambda model, other: flatness.hessian_density(model, X, Y),
    "sharpness": lambda model, other: flatness.sharpness(
        model, X, Y, eps=0.1, num_samples=1, num_starts=1, batch_norm_data=X
    ),
    "loss_landscape": lambda model, other: flatness.loss_landscape(model, X, Y),
    "interpolate": lambda model, other: flatness.interpolate(model, other, X, Y),
    "connect": lambda model, other: flatness.connect(model, other, X, Y, epochs=1),
}


@pytest.mark.parametrize(
    "name",
    [
        "update_batch_norm",
        *rest(*(name for name in CALLS if name != "update_batch_norm")),
    ],
)
def test_a_call_leaves_all_generators_alone(name: str) -> None:
    model, other = network(), network()
    values = numpy_values(model.variables)
    keras.utils.set_random_seed(0)
    expected = draws()
    keras.utils.set_random_seed(0)
    CALLS[name](model, other)
    assert draws() == expected
    assert_equal(numpy_values(model.variables), values)


@pytest.mark.parametrize("seed", [3, *rest(None)])
def test_passes_that_are_compared_make_the_same_draws(seed: int | None) -> None:
    """Their difference would count as divergence."""
    model = keras.Sequential(
        [keras.Input((5,)), AlwaysDropout(0.5, seed=seed), layers.Dense(3)]
    )
    compile_classifier(model, metrics=[])
    without = flatness.model_divergence(model, X, eps=0.0, num_samples=2)
    assert without.mean == pytest.approx(0.0, abs=1e-6)
    (batch,) = Batches(model, X)
    weights, state = stateless.current_values(model)
    of_outputs = BatchDivergence(
        model,
        model.trainable_variables,
        first_batch=batch,
        divergence=ChosenDivergences("auto"),
    )
    value = of_outputs(weights, Inputs(batch, weights, state))
    assert stateless.as_float(value) == pytest.approx(0.0, abs=1e-6)
