"""Models and rows for tables of bad input."""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values

NAN = float("nan")
X = np.ones((8, 3), "float32")
Y = np.ones((8, 2), "float32")
Z = np.ones((4, 3), "float32")
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def linear(loss: Any = "mse", *, outputs: int = 2) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(outputs)], name="linear")
    if loss != "uncompiled":
        model.compile("sgd", loss)
    return model


def branches(loss: Any = "mse", metrics: Any = None) -> keras.Model:
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, {"a": layers.Dense(2)(inputs), "b": layers.Dense(1)(inputs)}
    )
    model.compile("sgd", loss, metrics=metrics)
    return model


def stateful() -> keras.Model:
    lstm = layers.LSTM(2, stateful=True, name="lstm")
    model = keras.Sequential(
        [keras.Input(batch_shape=(8, 3)), layers.Reshape((3, 1)), lstm]
    )
    model.compile("sgd", "mse")
    return model


def without_weights() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Activation("relu")])
    model.compile("sgd", "mse")
    return model


def spoiled() -> keras.Model:
    model = linear()
    model.set_weights([np.full_like(w, NAN) for w in model.get_weights()])
    return model


def fit(model: keras.Model, x: Any = X, y: Any = Y, **options: Any) -> None:
    """`fit()` of the wrapped model, which must not have changed if it fails."""
    arguments = {key: options.pop(key) for key in list(options) if key in FIT}
    nrs = keras_nrs.wrap(model, **options)
    before = numpy_values(nrs.weights)
    try:
        nrs.fit(x, y, verbose=0, **arguments)
    except Exception:
        assert_equal(numpy_values(nrs.weights), before)
        raise


def train_on_batch(model: keras.Model, *data: Any) -> None:
    """One step. In `fit()` TensorFlow's graphs have batches of any size."""
    keras_nrs.wrap(model).train_on_batch(*data)


FIT = ("callbacks", "sample_weight", "epochs", "batch_size")


def row(
    id: str, error: type[Exception], match: str, function: Any, *args: Any, **kw: Any
) -> Any:
    return pytest.param(partial(function, *args, **kw), error, match, id=id)


OTHERS = r"`y` must have labels for the output 'b' as well.*Received: labels for \['a'"
LABELS = r"`y` must be labels that the loss can compare.*Received: y of shape "


def truncated(path: str) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path
