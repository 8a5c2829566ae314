"""Which losses are sums over samples, which means, which neither."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_nrs.keras_internals import build_for_batch
from keras_nrs.step.sample_dependence import layer_losses_are_sums
from keras_nrs.step.sample_dependence import loss_compares_samples
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values

X = np.zeros((5, 3), "float32")
Y = np.zeros((5, 1), "float32")


class Adds(layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(ops.sum(ops.square(x)))
        self.add_loss(ops.mean(ops.square(x)))
        # A router's balance: a product of means.
        self.add_loss(ops.sum(ops.mean(x, axis=0) * ops.mean(x > 0.5, axis=0)))
        # One for each sample: Keras adds them up.
        self.add_loss(ops.mean(ops.square(x), axis=1))
        return x


def model(*more: layers.Layer, loss: Any = "mse") -> keras.Model:
    network = keras.Sequential([keras.Input((3,)), *more, layers.Dense(1)])
    network.compile("sgd", loss)
    return network


def test_sums_and_means_that_layers_add() -> None:
    network = model(Adds(), layers.Dropout(0.5), layers.BatchNormalization())
    before = numpy_values(network.variables)
    assert layer_losses_are_sums(network, ops.convert_to_tensor(X)) == [
        True,
        False,
        False,
        True,
    ]
    assert_equal(numpy_values(network.variables), before)


def test_penalties_of_activities_are_means() -> None:
    """Keras divides them by the size of the batch."""
    network = model(layers.Dense(4, activity_regularizer="l2"))
    assert layer_losses_are_sums(network, ops.convert_to_tensor(X)) == [False]


def test_of_layers_that_take_no_made_up_data_nothing_is_known() -> None:
    class Picky(layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(ops.sum(x))
            if x.shape[0] == 2:
                raise TypeError("made up")
            return x

    assert layer_losses_are_sums(model(Picky()), ops.convert_to_tensor(X)) == []


def contrastive(y_true: Any, y_pred: Any) -> Any:
    similarities = ops.matmul(y_pred, ops.transpose(y_pred))
    return ops.mean(keras.ops.log_softmax(similarities, axis=-1))


def own_mean(y_true: Any, y_pred: Any) -> Any:
    weight = ops.cast(y_true > 0.4, y_pred.dtype)
    return ops.sum(weight * ops.square(y_pred - y_true)) / ops.sum(weight)


@pytest.mark.parametrize(
    ("loss", "compares"),
    [
        ("mse", False),
        ("binary_crossentropy", False),
        (keras.losses.MeanSquaredError(reduction="sum"), False),
        (own_mean, False),
        (contrastive, True),
        (lambda y_true, y_pred: ops.var(y_pred), True),
    ],
)
def test_losses_that_compare_samples(
    loss: str | Callable[..., Any], compares: bool
) -> None:
    batch = tuple(map(ops.convert_to_tensor, (X, Y)))
    found = loss_compares_samples(model(loss=loss), batch, ops.convert_to_tensor(Y))
    assert found == compares


def test_of_a_loss_that_takes_no_made_up_outputs_nothing_is_known() -> None:
    """It is for outputs above 1, and not a number for others."""
    network = model(loss=lambda y_true, y_pred: ops.mean(ops.sqrt(y_pred - 1), -1))
    batch = tuple(map(ops.convert_to_tensor, (X, Y)))
    assert not loss_compares_samples(network, batch, ops.convert_to_tensor(Y))


@pytest.mark.only_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_outputs", [2, 5, 100])
@pytest.mark.parametrize(
    "loss", ["categorical_crossentropy", "binary_crossentropy", "cosine_similarity"]
)
def test_rounding_is_no_comparison(loss: str, num_outputs: int, dtype: str) -> None:
    floatx = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        network = keras.Sequential([keras.Input((3,)), layers.Dense(num_outputs)])
        network.compile("sgd", loss)
        outputs = ops.zeros((5, num_outputs))
        batch = ops.zeros((5, 3)), ops.zeros((5, num_outputs))

        def compares(loss: Any) -> bool:
            network.compile("sgd", loss)
            build_for_batch(network, batch)
            found = loss_compares_samples(network, batch, outputs)
            value = keras.ops.mean(network.compute_loss(*batch, outputs))
            assert keras.backend.standardize_dtype(value.dtype) == dtype
            return found

        assert not compares(loss)
        assert compares(lambda y_true, y_pred: ops.var(y_pred, axis=0))
        # Among losses of the samples, one seventh of which it makes a difference to.
        assert compares(
            lambda y_true, y_pred: (
                ops.mean(ops.square(y_pred - y_true)) + contrastive(y_true, y_pred)
            )
        )
    finally:
        keras.config.set_floatx(floatx)
