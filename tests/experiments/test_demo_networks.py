"""The networks of the demo, and their initial weights."""

import keras
import numpy as np
import pytest

from keras_nrs.experiments.demo_networks import initial_weights
from keras_nrs.experiments.demo_networks import mlp
from keras_nrs.experiments.demo_networks import small_cnn

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_the_network_has_the_channels_that_its_name_promises() -> None:
    network = small_cnn()
    channels = [
        layer.filters
        for layer in network.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    assert channels == [16, 32, 32]
    assert network.output_shape == (None, 10)
    assert small_cnn((40, 1), 3).output_shape == (None, 3)


def test_the_mlp_is_that_of_the_study() -> None:
    assert mlp().count_params() == 118_282


def test_initial_weights_keep_the_variance_of_relu_activations() -> None:
    network = small_cnn()
    weights = initial_weights(network, seed=0)
    assert [w.shape for w in weights] == [tuple(v.shape) for v in network.weights]
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        fan_in = np.prod(kernel.shape[:-1])
        # Four standard errors of the variance of a normal sample.
        tolerance = 4 * np.sqrt(2 / kernel.size)
        assert np.var(kernel) * fan_in / 2 == pytest.approx(1, abs=tolerance)
        assert not bias.any()
