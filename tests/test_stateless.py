"""Calling a model with given values of its variables."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs import stateless
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.networks import compile_classifier


def model() -> keras.Model:
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(2), layers.BatchNormalization()]
    )


def test_values_in_a_scope_are_the_given_ones_and_variables_keep_theirs() -> None:
    network = model()
    before = numpy_values(network.variables)
    weights, state = stateless.current_values(network)
    x = np.ones((4, 2), "float32")
    with stateless.scope(network, [0 * w for w in weights], state) as scope:
        outputs = network(x, training=True)
        assert set(scope.updates) == {
            id(v) for v in network.non_trainable_variables if "moving" in v.name
        }
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), np.zeros((4, 2)))
    assert_equal(before, numpy_values(network.variables))


def test_only_models_that_take_training_get_it() -> None:
    class Plain(keras.Model):
        def call(self, x: object) -> object:
            return x

    assert stateless.call_kwargs(model(), training=True) == {"training": True}
    assert stateless.call_kwargs(Plain(), training=True) == {}


class InPlace(layers.Layer):
    """Changes its input where tensors can change."""

    def call(self, x: Any) -> Any:
        x += 1.0
        return x


def test_inputs_stay_as_they_are() -> None:
    x = ops.zeros((4, 2))
    network = keras.Sequential([keras.Input((2,)), InPlace()])
    outputs = stateless.call(network, x, training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), np.ones((4, 2)))
    np.testing.assert_array_equal(ops.convert_to_numpy(x), np.zeros((4, 2)))


def test_layer_losses_replace_the_layers_own() -> None:
    network = keras.Sequential(
        [keras.Input((2,)), layers.Dense(1, kernel_regularizer="l2")]
    )

    def losses() -> list[float]:
        return [ops.convert_to_numpy(loss).item() for loss in network.losses]

    (penalty,) = losses()
    with stateless.layer_losses(network, [ops.convert_to_tensor(2.0)]):
        assert losses() == [2.0]
    with stateless.layer_losses(network, []):
        assert losses() == [0.0]
    assert losses() == [penalty]


def test_a_result_is_made_once_until_the_model_changes() -> None:
    network, made = model(), []

    def cached() -> int:
        return stateless.cached_on_model(
            network, "key", lambda: made.append(0) or len(made)
        )

    assert (cached(), cached()) == (1, 1)
    network.compile(loss="mse")
    assert cached() == 2
    network.layers[0].trainable = False
    assert cached() == 3


class Assigns(layers.Layer):
    """Assigns a value to a weight, of which a gradient needs the result."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=shape[1:], initializer="ones")
        super().build(shape)

    def call(self, x: Any) -> Any:
        value = ops.exp(0.1 * self.scale)
        self.scale.assign(value)
        return x * value


@pytest.mark.not_jax
def test_a_weight_may_be_assigned_what_a_gradient_needs() -> None:
    network = keras.Sequential([keras.Input((2,)), Assigns(), layers.Dense(3)])
    compile_classifier(network, optimizer=keras.optimizers.SGD(0.0))
    nrs = keras_nrs.wrap(network, eps=0.0)
    nrs.train_on_batch(np.ones((4, 2), "float32"), np.arange(4) % 3)
    scale = ops.convert_to_numpy(network.layers[0].scale)
    np.testing.assert_allclose(scale, np.exp(0.1), rtol=1e-6)
