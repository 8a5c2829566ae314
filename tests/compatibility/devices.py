"""Training on several devices, which are virtual ones here."""

from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from tests.compatibility.way import Way
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

BACKEND = keras.config.backend()


def _check_devices(variables: list[Any], num: int) -> None:
    """Each variable is on so many devices, whole or in parts."""
    for variable in variables:
        found = 1
        if BACKEND == "jax":
            found = len(variable.value.sharding.device_set)
        elif BACKEND == "tensorflow":
            found = len(getattr(variable._value, "values", [variable]))
        assert found == num, f"the weights are on {found} device(s) instead of {num}"


def _train(way: Way, scope: AbstractContextManager[Any], num: int) -> None:
    x, y = image_data(32)
    with scope:
        model = cnn(dropout=0.5)
        trained = way.wrap(model)
        way.fit(trained, x, y)
        _check_devices(trained.trainable_variables, num)
        way.predict(trained, x)


def _names(num: int) -> list[str]:
    names = keras.distribution.list_devices("cpu")[:num]
    assert len(names) == num, f"{len(names)} device(s) instead of {num}"
    return names


def data_parallel(way: Way) -> None:
    scope = keras.distribution.DataParallel(devices=_names(4)).scope()
    _train(way, scope, 4)


def model_parallel(way: Way) -> None:
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), _names(4))
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*dense.*kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch"
    )
    x = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
    with distribution.scope():
        model = keras.Sequential(
            [keras.Input((16,)), keras.layers.Dense(8), keras.layers.Dense(4)]
        )
        compile_classifier(model)
        trained = way.train(model, x, np.arange(32) % 4)
        kernel = trained.trainable_variables[0]
        _check_devices([kernel], 4)
        assert kernel.value.sharding.shard_shape(kernel.shape) == (16, 4)


def mirrored_strategy(way: Way) -> None:
    import tensorflow as tf

    names = [f"CPU:{i}" for i in range(4 if BACKEND == "tensorflow" else 1)]
    strategy = tf.distribute.MirroredStrategy(
        names, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    _train(way, strategy.scope(), 4)
