"""What is measured of trained models."""

import math

import keras
import numpy as np
import pytest
from keras import layers

from studies import outcomes
from studies.outcomes import Forward
from studies.weight_changes import Kernels

pytestmark = pytest.mark.matrix


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CORRUPTED_SAMPLES", "NOISE_SAMPLES", "ROUNDING_SAMPLES"):
        monkeypatch.setattr(outcomes, name, 40)
    monkeypatch.setattr(outcomes, "BATCH_NORM_SAMPLES", 30)
    monkeypatch.setattr(outcomes, "FLATNESS_SAMPLES", 20)
    monkeypatch.setattr(outcomes, "BATCH", 20)
    monkeypatch.setattr(outcomes, "BITS", (3,))
    monkeypatch.setattr(outcomes, "NOISES", (0.1,))


@pytest.fixture
def samples(rng: np.random.Generator) -> outcomes.Samples:
    x = rng.normal(size=(50, 5, 5, 1)).astype("float32")
    return x, rng.integers(3, size=50)


@pytest.fixture
def model() -> keras.Model:
    inner = [layers.Conv2D(2, 3), layers.BatchNormalization(), layers.Flatten()]
    return keras.Sequential([keras.Input((5, 5, 1)), *inner, layers.Dense(3)])


def test_the_model_stays_as_it_is(
    model: keras.Model, samples: outcomes.Samples
) -> None:
    model.compile("sgd", "mse")
    before = model.get_weights()
    found = outcomes.measure(model, train=samples, validation=samples, test=samples)
    assert model.loss == "mse"
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert all(isinstance(v, float) and math.isfinite(v) for v in found.values())
    groups = {name.split("_")[0] for name in found}
    assert groups >= {"corrupted", "rounded", "int8", "int4", "noise", "scaled"}
    predicted = model.predict(samples[0], verbose=0).argmax(1)
    assert found["accuracy"] == pytest.approx(np.mean(predicted == samples[1]))
    kinds = [found[f"corrupted_{k}"] for k in ("noise", "blur", "contrast", "shift")]
    assert found["corrupted"] == pytest.approx(np.mean(kinds))


def test_logits_of_other_weights_need_no_other_model(
    model: keras.Model, samples: outcomes.Samples
) -> None:
    forward, weights = Forward(model), Kernels(model).rounded(2, per_filter=True)
    found = forward.logits(samples[0], weights)
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    expected = model.predict(samples[0], verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(forward.logits(samples[0]), expected, 1e-4, 1e-5)


def test_moments_are_measured_again_after_rounding(
    model: keras.Model, samples: outcomes.Samples
) -> None:
    x, y = samples
    # The moments are of a kernel that is a thousandth of this one.
    model.layers[0].kernel.assign(1000 * model.layers[0].kernel)
    found = outcomes.under_rounding(model, Forward(model), x, (x, y))
    assert list(found) == [
        "rounded_3_filter",
        "rounded_3_filter_batch_norm",
        "rounded_3_tensor",
        "rounded_3_tensor_batch_norm",
    ]
    assert found["rounded_3_filter"] != found["rounded_3_filter_batch_norm"]


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    # Two bins: confidence 0.9 with 1 of 2 right, 0.55 with 2 of 2.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.55, 0.45]])
    labels = np.array([0, 1, 0, 0])
    found = outcomes.calibration_error(np.log(probabilities), labels)
    assert found == pytest.approx((2 * 0.4 + 2 * 0.45) / 4)


def test_the_temperature_is_that_of_the_labels(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 2, size=(20_000, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert outcomes.best_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert outcomes.loss(logits, labels) == pytest.approx(
        -np.mean(np.log(probabilities[np.arange(20_000), labels]))
    )


def test_logits_that_are_not_finite_are_wrong() -> None:
    logits = np.array([[np.nan, 0.0], [1.0, np.inf], [1.0, 0.0]])
    assert outcomes.accuracy(logits, np.array([0, 1, 0])) == pytest.approx(1 / 3)
