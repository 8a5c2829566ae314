"""A pytest plugin for Keras's own tests: it wraps models, and records what happens.

    pytest -p tests.keras_suite.plugin --record FILE [--wrap] PATH ...

With `--wrap`, a method of `keras.Model` that trains, evaluates or predicts runs on the
wrapped model instead: with a delta of 0 and the doubled loss halved, so that it must
give what plain Keras gives. Its own logs are left out of results. Callbacks get the
wrapped model, and all logs.
"""

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import pytest

import keras_nrs
from keras_nrs.divergences import GaussianKL
from keras_nrs.step import output_divergences
from keras_nrs.step.output_divergences import for_model

# The class of the backend that has the methods of `keras.Model`.
Trainer: Any = next(c for c in keras.Model.__mro__ if "fit" in vars(c))
TRAINING = ("fit", "train_on_batch")
OTHERS = ("evaluate", "predict", "test_on_batch", "predict_on_batch")
# What Keras leaves on a model, and tests read there.
LEFT_ON_MODEL = ("history", "stop_training")
OWN_LOGS = ("model_divergence", "perturbed_loss")


class Record:
    """What one test did.

    Attributes:
        trainings: Number of calls of `fit()` and `train_on_batch()`: on wrapped models,
            and by each reason why a model was not wrapped.
        wrapped: The wrapped models by the `id()` of their base models.
    """

    def __init__(self) -> None:
        self.trainings: Counter[str] = Counter()
        self.wrapped: dict[int, keras_nrs.NRSModel] = {}


record = Record()


def reason_not_to_wrap(model: Any) -> str | None:
    if not isinstance(model, keras.Model):
        return "not a keras.Model"
    if type(model).train_step is not keras.Model.train_step:
        return "overrides train_step()"
    return None


def wrap(model: Any) -> keras_nrs.NRSModel:
    """The wrapped model of a model, one for each test."""
    if id(model) not in record.wrapped:
        record.wrapped[id(model)] = keras_nrs.wrap(
            model, eps=0.0, normalize=True, seed=0
        )
    return record.wrapped[id(model)]


def without_own_logs(result: Any) -> Any:
    """What `fit()` or `train_on_batch()` gives, as plain Keras has it."""
    logs = getattr(result, "history", result)
    if isinstance(logs, dict):
        for name in OWN_LOGS:
            logs.pop(name, None)
    return result


def on_wrapped(name: str) -> Callable[..., Any]:
    """A method of `Trainer` that runs on the wrapped model where there can be one."""
    method = getattr(Trainer, name)

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = reason_not_to_wrap(self)
        if name in TRAINING:
            record.trainings[reason or "wrapped"] += 1
        if reason is not None:
            return method(self, *args, **kwargs)
        wrapped = wrap(self)
        try:
            result = getattr(wrapped, name)(*args, **kwargs)
            return without_own_logs(result) if name in TRAINING else result
        finally:
            for attribute in LEFT_ON_MODEL:
                if hasattr(wrapped, attribute):
                    setattr(self, attribute, getattr(wrapped, attribute))

    return run


def for_any_model(model: Any, divergence: Any, *tensors: Any) -> Any:
    """`divergence="auto"`, with a divergence for losses that it does not know."""
    try:
        return for_model(model, divergence, *tensors)
    except ValueError:
        return for_model(model, GaussianKL(), *tensors)


class _LayerBeforeModel(type(keras.Model)):  # type: ignore[misc]
    """For classes of a model and a layer, whose methods come from the layer."""

    def mro(cls) -> list[type]:
        order = super().mro()
        order.remove(keras.Model)
        order.insert(order.index(keras.Layer), keras.Model)
        return order


class TrainerOfModels(keras.Model, metaclass=_LayerBeforeModel):  # type: ignore[misc]
    """Stands in for `Trainer`, of which Keras's tests make models without `Model`."""

    layers = None  # A name that they use for their own.

    def __init__(self) -> None:
        Trainer.__init__(self)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wrap", action="store_true", help="wrap models")
    parser.addoption("--record", help="file for a line of JSON for each test")


def skip_if_backend(backend: str, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(keras.config.backend() == backend, reason=reason)


def pytest_configure(config: pytest.Config) -> None:
    # Of Keras's own conftest.py, which its wheel lacks.
    sys.modules["conftest"] = SimpleNamespace(skip_if_backend=skip_if_backend)
    config.addinivalue_line("markers", "requires_trainable_backend: one of Keras's")
    if not config.getoption("--wrap"):
        return
    for name in (*TRAINING, *OTHERS):
        setattr(Trainer, name, on_wrapped(name))
    setattr(sys.modules[Trainer.__module__], Trainer.__name__, TrainerOfModels)
    output_divergences.for_model = for_any_model


def pytest_runtest_logstart() -> None:
    global record
    record = Record()
    keras.utils.set_random_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call" or report.outcome != "passed":
        error = str(call.excinfo.value)[:2000] if call.excinfo else None
        write_line(item.config, test=item.nodeid, outcome=report.outcome, error=error)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    if report.failed:
        write_line(collector.config, test=collector.nodeid, outcome="not imported")
    return report


def write_line(config: pytest.Config, **line: Any) -> None:
    line = {"error": None, "trainings": record.trainings} | line
    with open(config.getoption("--record"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
