"""Across modules: what Keras promises of `fit()`, `evaluate()` and `predict()`.

Each promise is kept by plain Keras and by three wrapped models that must do the same:
one of scheme `"baseline"` and one in which nothing is perturbed, bit for bit, and one
that runs the perturbed pass with a delta of 0 and halves the doubled loss.
"""

import functools
import json
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from tests.support.keras_trainer import OWN_LOGS
from tests.support.keras_trainer import VALIDATION
from tests.support.keras_trainer import WEIGHT
from tests.support.keras_trainer import X
from tests.support.keras_trainer import Y
from tests.support.keras_trainer import assert_same
from tests.support.keras_trainer import fit
from tests.support.keras_trainer import shared
from tests.support.matrix import rest


def batches(size: int = 8) -> Iterator[Any]:
    while True:
        for start in range(0, 24, size):
            batch = slice(start, start + size)
            yield X[batch], Y[batch], WEIGHT[batch]


class AtBoundaries(keras.callbacks.Callback):
    """Reads and changes the model between batches and epochs."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        model = getattr(self.model, "base_model", self.model)
        bias = model.layers[-1].bias
        bias.assign(bias * 0.5)
        if batch == 1:
            model.optimizer.learning_rate = 0.005

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(self.model.evaluate(X, Y, batch_size=8, verbose=0))
        self.seen.append(self.model.predict(X, batch_size=8, verbose=0))


class StopAt(keras.callbacks.Callback):
    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.stop)

    def stop(self, number: int, logs: Any = None) -> None:
        if number == 1:
            self.model.stop_training = True
            self.model.stop_evaluating = True
            self.model.stop_predicting = True


class Hooks(keras.callbacks.Callback):
    """Which hooks are called, with which logs."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []
        for when in ("begin", "end"):
            for what in ("train", "test", "predict"):
                self.watch(f"on_{what}_{when}")
                self.watch(f"on_{what}_batch_{when}")
            self.watch(f"on_epoch_{when}")

    def watch(self, hook: str) -> None:
        def call(*args: Any, logs: Any = None) -> None:
            numbers = [a for a in args if isinstance(a, int)]
            logs = next((a for a in args if isinstance(a, dict)), logs)
            self.called.append((hook, numbers, sorted(set(logs or {}) - OWN_LOGS)))

        setattr(self, hook, call)


def fit_generator(model: keras.Model, **kwargs: Any) -> Any:
    return fit(model, x=batches(), y=None, batch_size=None, shuffle=False, **kwargs)


def fit_twice(model: keras.Model) -> Any:
    return [fit(model, epochs=1), fit(model, epochs=2, initial_epoch=1)]


def fit_with_changes_at_boundaries(model: keras.Model) -> Any:
    callback = AtBoundaries()
    return [fit(model, callbacks=[callback]), callback.seen]


def hooks_of(method: str, model: keras.Model) -> Any:
    hooks = Hooks()
    inputs = {"x": X} if method == "predict" else {"x": X, "y": Y}
    validation = {"validation_split": 1 / 3} if method == "fit" else {}
    getattr(model, method)(
        **inputs, batch_size=8, callbacks=[hooks], verbose=0, **validation
    )
    # As text: names rather than numbers are compared.
    return np.array([json.dumps(call) for call in hooks.called])


def stopped(method: str, hook: str, model: keras.Model) -> Any:
    callback, inputs = StopAt(hook), {"x": X}
    if method == "fit":
        return fit(model, epochs=4, callbacks=[callback])
    if method == "evaluate":
        inputs["y"] = Y
    return getattr(model, method)(
        **inputs, batch_size=8, callbacks=[callback], verbose=0
    )


def steps_on_batches(model: keras.Model) -> Any:
    first, last = slice(0, 8), slice(8, 16)
    results: list[Any] = [
        model.train_on_batch(X[first], Y[first]),
        model.train_on_batch(
            X[last], Y[last], sample_weight=WEIGHT[last], return_dict=True
        ),
        model.train_on_batch(X[last], Y[last], class_weight={0: 1, 1: 2, 2: 3}),
    ]
    model.reset_metrics()
    results += [
        model.test_on_batch(X[first], Y[first]),
        model.test_on_batch(
            X[last], Y[last], sample_weight=WEIGHT[last], return_dict=True
        ),
        model.predict_on_batch(X[first]),
    ]
    return results


def evaluations(model: keras.Model) -> Any:
    evaluate = functools.partial(model.evaluate, batch_size=8, verbose=0)
    return [
        evaluate(X, Y),
        evaluate(X, Y, sample_weight=WEIGHT, return_dict=True),
        evaluate(X, Y, steps=2),
        model.evaluate(batches(), steps=3, verbose=0, return_dict=True),
    ]


def predictions(model: keras.Model) -> Any:
    return [
        model.predict(X, batch_size=8, verbose=0),
        model.predict(X, batch_size=8, steps=2, verbose=0),
        model.predict(batches(), steps=4, verbose=0),
    ]


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "shuffled": fit,
    "class_weight": lambda m: fit(m, class_weight={0: 1.0, 1: 0.5, 2: 2.0}),
    "sample_weight": lambda m: fit(m, sample_weight=WEIGHT),
    "validation_split": lambda m: fit(m, validation_split=1 / 3, sample_weight=WEIGHT),
    "validation_freq": lambda m: fit(m, epochs=3, validation_freq=2, **VALIDATION),
    "validation at epochs": lambda m: fit(
        m, epochs=3, validation_freq=[1, 3], **VALIDATION
    ),
    "weighted validation": lambda m: fit(
        m, validation_data=(X, Y, WEIGHT), validation_batch_size=8, validation_steps=2
    ),
    "steps_per_epoch": lambda m: fit_generator(m, steps_per_epoch=2),
    "generators": lambda m: fit_generator(
        m, steps_per_epoch=3, validation_data=batches(), validation_steps=2
    ),
    "few steps of arrays": lambda m: fit(m, steps_per_epoch=2),
    "twice": fit_twice,
    "changes at boundaries": fit_with_changes_at_boundaries,
    "hooks of fit": functools.partial(hooks_of, "fit"),
    "hooks of evaluate": functools.partial(hooks_of, "evaluate"),
    "hooks of predict": functools.partial(hooks_of, "predict"),
    "stopped at a batch": functools.partial(stopped, "fit", "on_train_batch_end"),
    "stopped at an epoch": functools.partial(stopped, "fit", "on_epoch_end"),
    "stopped evaluate": functools.partial(stopped, "evaluate", "on_test_batch_end"),
    "stopped predict": functools.partial(stopped, "predict", "on_predict_batch_end"),
    "on batches": steps_on_batches,
    "evaluate": evaluations,
    "predict": predictions,
}


# Those that run other code of Keras's trainer, each in its own way.
FEW = [
    "shuffled",
    "class_weight",
    "validation_freq",
    "generators",
    "changes at boundaries",
    "hooks of fit",
    "stopped at a batch",
    "on batches",
    "evaluate",
    "predict",
]


@functools.cache
def in_keras(action: str) -> tuple[Any, list[np.ndarray]]:
    trained = shared(None)
    result = ACTIONS[action](trained.start())
    return result, trained.state


# Keras warns where data ends within an epoch, as it should.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name", ["delta of 0", *rest("baseline", "nothing perturbed")])
@pytest.mark.parametrize("action", [*FEW, *rest(*(a for a in ACTIONS if a not in FEW))])
def test_as_in_keras(action: str, name: str) -> None:
    expected, expected_state = in_keras(action)
    trained = shared(name)
    result = ACTIONS[action](trained.start())
    if "hooks" in action:
        np.testing.assert_array_equal(result, expected)
    else:
        assert_same(name, result, expected)
    assert_same(name, trained.state, expected_state)
