"""A model for what Keras promises of training, and its comparison with plain Keras."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_nrs
from tests.support.asserts import numpy_values
from tests.support.networks import compile_classifier

WRAPPED: dict[str, dict[str, Any]] = {
    "baseline": {"scheme": "baseline"},
    "nothing perturbed": {"alpha": 0.0, "beta": 0.0},
    "delta of 0": {"eps": 0.0, "normalize": True},
}
# What training logs have besides plain Keras's.
OWN_LOGS = {"model_divergence", "perturbed_loss"}
RNG = np.random.default_rng(5)
Y = RNG.integers(0, 3, 24).astype("int32")
X = (RNG.normal(size=(24, 4)) + Y[:, None]).astype("float32")
WEIGHT = RNG.uniform(0.5, 2.0, 24).astype("float32")


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class LargestLogit(keras.metrics.Metric):
    """A metric with a state of its own."""

    def __init__(self, name: str = "largest", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        largest = keras.ops.max(y_pred)
        self.largest.assign(keras.ops.maximum(self.largest, largest))

    def result(self) -> Any:
        return keras.ops.copy(self.largest.value)


def classifier() -> keras.Model:
    """With dropout, BatchNorm, and every kind of metric."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="tanh"),
            layers.BatchNormalization(momentum=0.8),
            layers.Dropout(0.3, seed=1),
            layers.Dense(3),
        ]
    )
    compile_classifier(
        model,
        optimizer=keras.optimizers.Adam(0.02),
        metrics=["accuracy", LargestLogit()],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    return model


class Trained:
    """A compiled model, used again and again from the state in which it was made."""

    def __init__(self, model: keras.Model, **wrapped: Any) -> None:
        self.model = keras_nrs.wrap(model, seed=0, **wrapped) if wrapped else model
        self.model.optimizer.build(model.trainable_variables)
        # The metrics are built at the first batch.
        self.model.train_on_batch(X[:8], Y[:8])
        self.variables = [*self.model.variables, *self.model.optimizer.variables]
        self.start()
        self.first = numpy_values(self.variables)

    def start(self) -> keras.Model:
        if hasattr(self, "first"):
            for variable, value in zip(self.variables, self.first, strict=True):
                variable.assign(value)
        self.model.reset_metrics()
        self.model._initial_epoch = None  # `BackupAndRestore` leaves it behind.
        keras.utils.set_random_seed(7)
        return self.model

    @property
    def state(self) -> list[np.ndarray]:
        base = getattr(self.model, "base_model", self.model)
        return numpy_values([*base.variables, *base.optimizer.variables])


@functools.cache
def shared(name: str | None) -> Trained:
    keras.utils.set_random_seed(0)
    return Trained(classifier(), **(WRAPPED[name] if name else {}))


def assert_same(name: str, got: Any, expected: Any) -> None:
    """Equal results: histories, logs, or arrays."""
    if isinstance(expected, dict):
        assert set(expected) == set(got) - OWN_LOGS
        for key, value in expected.items():
            assert_same(name, got[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(name, one, other)
    elif name == "delta of 0":
        # Six steps, of some hundred roundings each, and Adam amplifies small
        # gradients' errors.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(got, expected)


def fit(model: keras.Model, **kwargs: Any) -> dict[str, Any]:
    arguments = {"x": X, "y": Y, "batch_size": 8, "epochs": 2, "verbose": 0}
    history = model.fit(**(arguments | kwargs))
    return {**history.history, "epoch": history.epoch}


VALIDATION = {"validation_data": (X[:16], Y[:16]), "validation_batch_size": 8}


def both(make: Callable[[], keras.Model], action: Callable[[Any], Any]) -> None:
    """The same results and weights, bare, as a baseline and with a delta of 0.

    Where steps are compiled, `test_trainers.py` alone has the baseline.
    """
    is_torch = keras.config.backend() == "torch"

    def outcome(**wrapped: Any) -> Any:
        keras.utils.set_random_seed(0)
        model = make()
        result = action(keras_nrs.wrap(model, seed=0, **wrapped) if wrapped else model)
        return result, numpy_values(model.variables + model.optimizer.variables)

    expected = outcome()
    for name in ("baseline", "delta of 0") if is_torch else ("delta of 0",):
        assert_same(name, outcome(**WRAPPED[name]), expected)
