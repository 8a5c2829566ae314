"""What `compile()` and `fit()` take."""

from typing import Any

import keras
import numpy as np
from keras import layers

from tests.compatibility.way import Way
from tests.compatibility.way import fails
from tests.compatibility.way import unwrapped
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

X, Y = image_data(32)


def _compiled(**kwargs: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = cnn(compile=False)
    compile_classifier(model, **kwargs)
    return model


def gradient_accumulation(way: Way) -> None:
    """The weights move at every fourth batch."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    trained = way.wrap(_compiled(optimizer=optimizer))
    moved = []
    for start in range(0, 32, 4):
        before = numpy_values(trained.trainable_variables)
        batch = slice(start, start + 4)
        logs = trained.train_on_batch(X[batch], Y[batch], return_dict=True)
        way.check_logs(logs)
        after = numpy_values(trained.trainable_variables)
        moved.append(not all(map(np.array_equal, before, after)))
    assert moved == [False, False, False, True] * 2
    way.fit(trained, X, Y)


def ema(way: Way) -> str:
    """The weights are the averages at the end, and in evaluations if swapped."""
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    trained = way.wrap(_compiled(optimizer=optimizer))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    way.fit(trained, X, Y, callbacks=[swap], validation_data=(X, Y))
    assert_equal(
        numpy_values(trained.trainable_variables),
        numpy_values(optimizer._model_variables_moving_average),
    )
    way.predict(trained, X)
    error = fails(lambda: way.fit(trained, X, Y))
    return f"a second `fit()` fails unless compiled again ({error})" if error else ""


def steps_per_execution(way: Way) -> None:
    """Keras calls a callback once for each execution."""
    ends = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(batch)
    )
    way.train(_compiled(steps_per_execution=2), X, Y, epochs=1, callbacks=[callback])
    assert len(ends) == 2, f"{len(ends)} executions of 4 batches"


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class CountedCalls(layers.Layer):
    """Counts how often Python calls it."""

    num_calls = 0

    def call(self, inputs: Any) -> Any:
        CountedCalls.num_calls += 1
        return inputs


def run_eagerly(way: Way) -> None:
    CountedCalls.num_calls = 0
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), CountedCalls(), layers.Flatten(), layers.Dense(3)]
    )
    compile_classifier(model, run_eagerly=True)
    trained = way.wrap(model)
    way.fit(trained, X, Y, epochs=1, batch_size=2)
    assert CountedCalls.num_calls >= 16
    way.predict(trained, X)


def jit_compile(way: Way) -> None:
    trained = way.train(_compiled(jit_compile=True), X, Y)
    assert trained.jit_compile is True


def class_weight(way: Way) -> None:
    """It is the `sample_weight` of the samples of a class."""
    weights = []
    for kwargs in (
        {"class_weight": {0: 0.2, 1: 1.0, 2: 3.0}},
        {"sample_weight": np.array([0.2, 1.0, 3.0], "float32")[Y]},
        {},
    ):
        trained = way.train(_compiled(), X, Y, **kwargs)
        weights.append(np.concatenate([w.ravel() for w in trained.get_weights()]))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 1e-4


def sample_weight(way: Way) -> None:
    """Samples of no weight are as if they had another label."""
    weight = np.where(np.arange(32) % 2, 0.0, 2.0).astype("float32")
    other = np.where(np.arange(32) % 2, (Y + 1) % 3, Y)
    weights = []
    for y in (Y, other):
        trained = way.train(
            _compiled(), X, y, sample_weight=weight, validation_data=(X, Y, weight)
        )
        weights.append(trained.get_weights())
    assert_equal(*weights)


def on_batches(way: Way) -> None:
    trained = way.wrap(_compiled())
    before = numpy_values(trained.trainable_variables)
    for _ in range(2):
        logs = trained.train_on_batch(X[:8], Y[:8], return_dict=True)
        way.check_logs(logs)
    after = numpy_values(trained.trainable_variables)
    assert not any(map(np.array_equal, before, after))
    base = unwrapped(trained)
    results = trained.test_on_batch(X, Y)
    base.reset_metrics()
    np.testing.assert_array_equal(results, base.test_on_batch(X, Y))
    np.testing.assert_array_equal(trained.predict_on_batch(X), base.predict_on_batch(X))
