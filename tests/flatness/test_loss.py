"""The loss that is measured: its models, data and precision."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs.flatness import hessian_operator
from tests.support import hessians
from tests.support.asserts import relative_error
from tests.support.data import PyDataset
from tests.support.data import data_loader
from tests.support.data import generator
from tests.support.data import image_data
from tests.support.data import tf_dataset
from tests.support.networks import cnn


@pytest.fixture(scope="module")
def of_arrays() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """A model, its Hessian on 30 samples, and on the first 16 of them."""
    x, y = hessians.data(30)
    model = hessians.classifier()
    first = hessian_operator(model, x[:16], y[:16]).to_dense()
    return model, hessian_operator(model, x, y).to_dense(), first


@pytest.mark.matrix
@pytest.mark.parametrize("form", [generator, PyDataset, tf_dataset, data_loader])
def test_forms_of_data(
    form: Callable[..., Any], of_arrays: tuple[keras.Model, np.ndarray, np.ndarray]
) -> None:
    """Each can be read many times, even a generator."""
    model, expected, expected_of_first = of_arrays
    x, y = hessians.data(30)
    operator = hessian_operator(model, form(x, y))
    for _ in range(2):
        assert relative_error(operator.to_dense(), expected) < 1e-5
    of_first = hessian_operator(model, form(x, y), steps=2).to_dense()
    assert relative_error(of_first, expected_of_first) < 1e-5


def test_mixed_precision_is_measured_in_full() -> None:
    x, y = image_data(32)
    model = cnn()
    expected = hessian_operator(model, x, y, variables="all").to_dense()
    weights = model.get_weights()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = cnn()
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights(weights)
    measured = hessian_operator(model, x, y, variables="all").to_dense()
    assert relative_error(measured, expected) < 1e-6
    assert model.layers[0].compute_dtype == "bfloat16"


@pytest.mark.matrix
def test_a_wrapped_model_has_the_hessian_of_its_base_model() -> None:
    x, y = hessians.data(16)
    model = hessians.classifier()
    expected = hessian_operator(model, x, y).to_dense()
    wrapped = keras_nrs.wrap(model, eps=0.1)
    np.testing.assert_array_equal(hessian_operator(wrapped, x, y).to_dense(), expected)


@pytest.mark.matrix
def test_errors_of_the_forward_pass_are_left_alone() -> None:
    x, _ = hessians.data(8)
    model = hessians.classifier(loss="categorical_crossentropy")
    with pytest.raises(ValueError, match=r"[Ss]hape"):
        hessian_operator(model, x, np.zeros((8, 7), "float32")).to_dense()


@pytest.mark.matrix
def test_bad_models_and_data() -> None:
    x, y = hessians.data(8)
    model = hessians.classifier()
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        hessian_operator("model", x, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model` must be built"):
        hessian_operator(keras.Sequential([layers.Dense(1)]), x, y)
    with pytest.raises(ValueError, match="`model` must be compiled with a loss"):
        hessian_operator(cnn(compile=False), x, y)
    with pytest.raises(ValueError, match="must be arrays with one number of samples"):
        hessian_operator(model, x, y[:3])
    with pytest.raises(ValueError, match="at least one"):
        hessian_operator(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="`y` and `sample_weight` must be None"):
        hessian_operator(model, generator(x, y), y)
    with pytest.raises(ValueError, match="at least one batch"):
        hessian_operator(model, generator(x[:0], y[:0]))
    with pytest.raises(TypeError, match="`x` must be an array"):
        hessian_operator(model, "x")
    with pytest.raises(TypeError, match="`regularizers` must be True or False"):
        hessian_operator(model, x, y, regularizers=1)  # type: ignore[arg-type]


@pytest.mark.matrix
def test_an_endless_data_set_needs_steps() -> None:
    x, y = hessians.data(8)
    model = hessians.classifier()
    with pytest.raises(ValueError, match="`steps` must be the number of batches"):
        hessian_operator(model, tf_dataset(x, y).repeat())
    endless = hessian_operator(model, tf_dataset(x, y).repeat(), steps=1)
    expected = hessian_operator(model, x, y).to_dense()
    assert relative_error(endless.to_dense(), expected) < 1e-6


@pytest.mark.matrix
def test_some_batches_of_a_shuffled_data_set() -> None:
    """The same ones at each product."""
    x, y = hessians.data(30)
    shuffled = tf_dataset(x, y).unbatch().shuffle(30, seed=0).batch(8)
    operator = hessian_operator(hessians.classifier(), shuffled, steps=2)
    np.testing.assert_array_equal(operator.to_dense(), operator.to_dense())


@pytest.mark.matrix
def test_labels_that_are_no_array() -> None:
    x, y = hessians.data(8)
    with pytest.raises(TypeError, match="`y` must be an array"):
        hessian_operator(hessians.classifier(), x, list(map(int, y)))
