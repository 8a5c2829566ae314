"""What is measured of a model on validation data."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.keras_internals import build_for_batch
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.measures import calibration_error
from keras_nrs.tuning.measures import choose_metric
from keras_nrs.tuning.measures import measure

pytestmark = pytest.mark.matrix


def test_the_calibration_error_of_two_bins() -> None:
    # In one bin 0.9 are right in 2 of 4 cases, in the other 0.6 in 1 of 1.
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.6])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 1, 1, 0])
    expected = (4 * 0.4 + 1 * 0.4) / 5
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert math.isnan(calibration_error(np.full((2, 2), np.nan), labels[:2]))


def linear(outputs: int, activation: str | None, loss: Any) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(outputs, activation=activation)]
    )
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


SPARSE = keras.losses.SparseCategoricalCrossentropy
BINARY = keras.losses.BinaryCrossentropy
CASES = {
    "logits": (3, None, SPARSE(from_logits=True), CategoricalKL(from_logits=True)),
    "softmax": (3, "softmax", SPARSE(), CategoricalKL()),
    "one-hot": (3, "softmax", "categorical_crossentropy", CategoricalKL()),
    "sigmoid": (1, "sigmoid", BINARY(), BernoulliKL()),
    "logit": (1, None, BINARY(from_logits=True), BernoulliKL(from_logits=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_probabilities_come_from_all_kinds_of_outputs(
    name: str, rng: np.random.Generator
) -> None:
    outputs, activation, loss, kind = CASES[name]
    model = linear(outputs, activation, loss)
    x = rng.normal(size=(20, 3)).astype("float32")
    classes = rng.integers(0, max(outputs, 2), 20)
    y = np.eye(3)[classes] if name == "one-hot" else classes
    found = measure(model, {"x": x, "y": y}, batch_size=8, outputs_are=kind)
    logits = x @ keras.ops.convert_to_numpy(model.layers[-1].kernel)
    if outputs == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = calibration_error(probabilities, classes)
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-6)
    loss, accuracy = model.evaluate(x, y, batch_size=8, verbose=0)
    assert (found["loss"], found["accuracy"]) == pytest.approx((loss, accuracy))


def built(metrics: Any, outputs: int = 1) -> keras.Model:
    inputs = keras.Input((3,))
    heads = [layers.Dense(2, name=f"head{i}")(inputs) for i in range(outputs)]
    model = keras.Model(inputs, heads if outputs > 1 else heads[0])
    model.compile("sgd", "mse", metrics=metrics)
    y = [np.ones((4, 2))] * outputs
    build_for_batch(model, (np.ones((4, 3)), y if outputs > 1 else y[0]))
    return model


def own(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(y_pred)


@pytest.mark.parametrize(
    ("metrics", "given", "expected"),
    [
        ([], "auto", ("loss", -1)),
        (["accuracy"], "auto", ("accuracy", 1)),
        (["acc", "mae"], "auto", ("acc", 1)),
        ([own], "auto", ("loss", -1)),
        (["mae", "accuracy"], "mae", ("mae", -1)),
        ([own], ("own", "max"), ("own", 1)),
        (["mae"], ("mae", "max"), ("mae", 1)),
        (["accuracy"], "calibration_error", ("calibration_error", -1)),
    ],
)
def test_the_metric(metrics: Any, given: Any, expected: tuple[str, int]) -> None:
    assert choose_metric(built(metrics), given, is_classifier=True) == expected


def test_metrics_of_several_outputs() -> None:
    model = built([["accuracy"], ["accuracy", "mae"]], outputs=2)
    choose: Any = lambda given: choose_metric(model, given, is_classifier=False)  # noqa: E731
    assert choose("head1_mae") == ("head1_mae", -1)
    assert choose("head0_accuracy") == ("head0_accuracy", 1)
    assert choose("auto") == ("loss", -1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("accuracy", "`metric` must be 'auto' or one of"),
        (3, "`metric` must be 'auto' or one of"),
        ("calibration_error", "`metric` must be 'auto' or one of"),
        ("own", "must say whether more of 'own' is better"),
        (("own", "up"), "must say whether more of 'own' is better"),
    ],
)
def test_bad_metrics(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_metric(built([own]), given, is_classifier=False)


def test_how_metrics_are_shown() -> None:
    assert Metric("val_acc", 1).heading == "val acc (%)"
    assert Metric("calibration_error", -1).scale == 100
    assert (Metric("mae", -1).heading, Metric("mae", -1).scale) == ("mae", 1)
