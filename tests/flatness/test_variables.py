"""Which variables are measured."""

from typing import Any

import keras
import numpy as np
from keras import layers

from keras_nrs.flatness import hessian_operator
from tests.support import hessians
from tests.support.asserts import relative_error
from tests.support.networks import compile_classifier


def test_freezing_a_layer_between_measurements() -> None:
    x, y = hessians.data(8)
    model = hessians.classifier()
    hessian_operator(model, x, y).to_dense()
    model.layers[0].trainable = False
    compile_classifier(model)
    operator = hessian_operator(model, x, y, variables="all")
    assert operator.shape == (215 - 84, 215 - 84)
    model.layers[0].trainable, model.layers[1].trainable = True, False
    expected = hessians.dense_hessian(
        model, x, y, model.trainable_variables, regularizers=True
    )
    operator = hessian_operator(model, x, y, variables="all")
    assert relative_error(operator.to_dense(), expected) < 1e-5


def test_the_last_layer_of_a_subclassed_model() -> None:
    class Nested(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.features = layers.Dense(8)
            self.head = keras.Sequential([layers.Dense(7), layers.Dense(5)])

        def call(self, inputs: Any) -> Any:
            return self.head(self.features(inputs))

    model = Nested()
    model.compile(loss="mse")
    x = np.ones((4, 3), "float32")
    model(x)
    operator = hessian_operator(model, x, np.ones((4, 5), "float32"))
    assert [tuple(v.shape) for v in operator.variables] == [(7, 5), (5,)]
