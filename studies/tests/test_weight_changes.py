"""Kernels that are rounded, noisy or quantized."""

import keras
import numpy as np
import pytest
from keras import layers

from studies.weight_changes import Kernels
from studies.weight_changes import quantized

pytestmark = pytest.mark.matrix


@pytest.fixture
def model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(2),
            layers.Flatten(),
            layers.Dense(4, bias_initializer="ones"),
        ]
    )


def filters_of(kernels: list[np.ndarray]) -> list[np.ndarray]:
    """The filters of the model's three kernels, one after the other."""
    conv, depthwise, dense = (w for w in kernels if w.ndim > 1)
    return [
        *(conv[..., i] for i in range(3)),
        *(depthwise[:, :, i, 0] for i in range(3)),
        *(dense[:, i] for i in range(4)),
    ]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_filters_are_rounded_to_a_grid_of_their_own(
    model: keras.Model, bits: int
) -> None:
    kernels = Kernels(model)
    rounded = kernels.rounded(bits, per_filter=True)
    levels = 2 ** (bits - 1) - 1
    for old, new in zip(filters_of(kernels.weights), filters_of(rounded), strict=True):
        step = np.abs(old).max() / levels
        np.testing.assert_allclose(
            new, np.round(old / step) * step, rtol=1e-5, atol=1e-7
        )
        assert len(np.unique(np.round(new / step))) <= 2 * levels + 1
        np.testing.assert_allclose(np.abs(new).max(), np.abs(old).max(), rtol=1e-5)


def test_kernels_are_rounded_to_one_grid(model: keras.Model) -> None:
    kernels = Kernels(model)
    rounded = kernels.rounded(3, per_filter=False)
    for old, new in zip(kernels.weights, rounded, strict=True):
        if old.ndim < 2:  # Biases, scales and offsets.
            np.testing.assert_array_equal(new, old)
        else:
            step = np.abs(old).max() / 3
            np.testing.assert_allclose(
                new, np.round(old / step) * step, rtol=1e-5, atol=1e-7
            )


def test_filters_of_zeros_stay(model: keras.Model) -> None:
    model.set_weights([np.zeros(w.shape) for w in model.get_weights()])
    kernels = Kernels(model)
    noise = np.random.default_rng(0)
    for weights in (
        kernels.rounded(2, per_filter=True),
        kernels.noisy(0.1, noise, per_filter=True),
        kernels.noisy(0.1, noise, per_filter=False),
    ):
        assert not any(np.any(w) for w in weights)


def test_noise_has_the_norm_of_a_share_of_each_filter(
    model: keras.Model, rng: np.random.Generator
) -> None:
    kernels = Kernels(model)
    noisy = kernels.noisy(0.2, rng, per_filter=True)
    for old, new in zip(filters_of(kernels.weights), filters_of(noisy), strict=True):
        found, expected = np.linalg.norm(new - old), 0.2 * np.linalg.norm(old)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(noisy[-1], np.ones(4))


def test_noise_is_a_share_of_the_largest_weight(rng: np.random.Generator) -> None:
    model = keras.Sequential([keras.Input((100,)), layers.Dense(100)])
    kernels = Kernels(model)
    kernel = kernels.weights[0]
    noise = kernels.noisy(0.1, rng, per_filter=False)[0] - kernel
    np.testing.assert_allclose(noise.std(), 0.1 * np.abs(kernel).max(), rtol=0.03)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_dense_layers_are_quantized_and_convolutions_are_not(
    model: keras.Model, rng: np.random.Generator, mode: str
) -> None:
    copy, share = quantized(model, mode)
    assert share == pytest.approx(27 * 4 / (54 + 3 + 6 + 12 + 3 + 27 * 4 + 4))
    x = rng.normal(size=(5, 6, 6, 2)).astype("float32")
    expected, found = model(x), copy(x)
    differences = keras.ops.convert_to_numpy(found - expected)
    assert 0 < np.abs(differences).max() < (0.05 if mode == "int8" else 0.5)
    convolution = keras.Model(model.inputs, model.layers[0].output)
    _, none = quantized(convolution, mode)
    assert none == 0
