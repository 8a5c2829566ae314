"""The two ways in which a check is run, and what must be true of any training."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values


class Way:
    """How a check trains: with NRS, or with Keras alone.

    The second tells whether what fails is Keras's or ours.

    Args:
        wrapped: Whether `wrap()` wraps. Otherwise it gives the model back.
    """

    def __init__(self, wrapped: bool = True) -> None:
        self.wrapped = wrapped

    def wrap(self, model: keras.Model, **kwargs: Any) -> Any:
        if not self.wrapped:
            return model
        options = {"eps": 0.3, "perturbation": "relative", "seed": 0} | kwargs
        return keras_nrs.wrap(model, **options)

    def train(self, model: keras.Model, x: Any, y: Any = None, **kwargs: Any) -> Any:
        """Wrap, fit and predict. Returns the trained model."""
        trained = self.wrap(model)
        self.fit(trained, x, y, **kwargs)
        self.predict(trained, x)
        return trained

    def fit(self, model: Any, x: Any, y: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Fit a wrapped model and assert what must be true. Returns the history."""
        weights = {v.path: v for v in model.weights}
        before = _values(weights)
        options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
        history = model.fit(x, y, **options | kwargs).history
        self.check_logs(history)
        if before:  # The weights of some models are made at the first batch.
            assert_moved(model, before, _values(weights))
        return history

    def check_logs(self, logs: dict[str, Any]) -> None:
        for name, values in logs.items():
            assert np.all(np.isfinite(values)), f"{name} is not finite"
        if self.wrapped:
            # Of a new model it may be nothing but rounding at first.
            assert np.max(logs["model_divergence"]) > 0, "no divergence"

    def predict(self, model: Any, x: Any) -> Any:
        """The predictions, which are those of the model that was wrapped."""
        outputs = model.predict(x, verbose=0)
        expected = unwrapped(model).predict(x, verbose=0)
        keras.tree.assert_same_structure(outputs, expected)
        assert_equal(keras.tree.flatten(outputs), keras.tree.flatten(expected))
        return outputs


def unwrapped(model: Any) -> Any:
    return getattr(model, "base_model", model)


def _values(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    return dict(zip(weights, numpy_values(list(weights.values())), strict=True))


def assert_moved(
    model: Any, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> None:
    """All that is trainable has moved, and nothing else but moving statistics."""
    trainable = {v.path for v in model.trainable_variables}
    assert trainable, "nothing is trainable"
    for path, value in before.items():
        if not path.rpartition("/")[2].startswith("moving_"):
            moved = not np.array_equal(value, after[path])
            expected = path in trainable
            assert moved == expected, f"{path} {'moved' if moved else 'did not move'}"


def fails(action: Callable[[], Any]) -> str:
    """In short, how an action fails, or an empty text."""
    try:
        action()
    except Exception as error:
        return short(error)
    return ""


def short(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [
        line
        for line in lines
        if line and not line.startswith(("Exception encountered", "Detected at node"))
    ]
    text = told[0].replace("\x1b[1m", "").replace("\x1b[0m", "") if told else ""
    if len(text) > 150:
        text = text[:150].rpartition(" ")[0] + " …"
    if isinstance(error, AssertionError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)
