"""Perturbations along a gradient: closed forms."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_nrs
from keras_nrs.perturbations import AdaptiveAscent
from keras_nrs.perturbations import Ascent
from tests.support.asserts import numpy_values

KERNEL = np.array([[1.0, -2.0], [0.0, 0.5]])
BIAS = np.array([3.0, -1.0])
OF_KERNEL = np.array([[0.3, 0.1], [-0.2, 0.4]])
OF_BIAS = np.array([0.5, -0.1])


def sample(
    perturbation: Ascent, eps: float, *gradients: np.ndarray
) -> list[np.ndarray]:
    weights, of_weights = (
        [ops.convert_to_tensor(array, "float32") for array in arrays]
        for arrays in ((KERNEL, BIAS), gradients)
    )
    deltas = perturbation.sample(weights, eps, 0, gradients=of_weights)
    return numpy_values(deltas)


def test_ascent_has_one_norm_for_all_weights() -> None:
    norm = np.sqrt(np.sum(OF_KERNEL**2) + np.sum(OF_BIAS**2))
    kernel, bias = sample(Ascent(), 0.2, OF_KERNEL, OF_BIAS)
    np.testing.assert_allclose(kernel, 0.2 * OF_KERNEL / norm, rtol=1e-6)
    np.testing.assert_allclose(bias, 0.2 * OF_BIAS / norm, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
def test_adaptive_ascent_scales_kernels_by_their_size(eta: float) -> None:
    scale = np.abs(KERNEL) + eta
    norm = np.sqrt(np.sum((scale * OF_KERNEL) ** 2) + np.sum(OF_BIAS**2))
    kernel, bias = sample(AdaptiveAscent(eta=eta), 0.2, OF_KERNEL, OF_BIAS)
    np.testing.assert_allclose(kernel, 0.2 * scale**2 * OF_KERNEL / norm, rtol=1e-6)
    np.testing.assert_allclose(bias, 0.2 * OF_BIAS / norm, rtol=1e-6)


@pytest.mark.parametrize("perturbation", [Ascent(), AdaptiveAscent()])
def test_no_gradient_is_no_perturbation(perturbation: Ascent) -> None:
    for delta in sample(perturbation, 0.2, 0 * OF_KERNEL, 0 * OF_BIAS):
        np.testing.assert_array_equal(delta, 0.0)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    first, second = (
        sample(AdaptiveAscent(), 0.2, c * OF_KERNEL, c * OF_BIAS)
        for c in (1.0, 2.0**15)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_configs() -> None:
    config = keras.saving.serialize_keras_object(AdaptiveAscent(eta=0.1))
    restored = keras.saving.deserialize_keras_object(config)
    assert isinstance(restored, AdaptiveAscent) and restored.eta == 0.1
    with pytest.raises(ValueError, match="`eta` must be"):
        AdaptiveAscent(eta=-1.0)


@pytest.mark.parametrize("name", ["ascent", "adaptive_ascent"])
def test_measurements_have_no_labels_for_a_gradient(name: str) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.zeros((4, 2), "float32")
    for measure in (
        lambda: keras_nrs.flatness.model_divergence(
            model, x, eps=0.1, perturbation=name
        ),
        lambda: keras_nrs.calibrate_eps(
            model, x, target_divergence=0.1, perturbation=name
        ),
    ):
        with pytest.raises(ValueError, match="must not need the gradient of a loss"):
            measure()


@pytest.mark.parametrize("perturbation", [Ascent(), AdaptiveAscent()])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_overflow_is_no_perturbation(perturbation: Ascent, value: float) -> None:
    """An optimizer that scales the loss leaves out the step, whose loss is logged."""
    for delta in sample(perturbation, 0.2, OF_KERNEL, np.array([0.5, value])):
        np.testing.assert_array_equal(delta, 0.0)
