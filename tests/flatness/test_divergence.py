from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.divergence_meter import keys_of_samples
from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import model_divergence
from tests.support.data import generator
from tests.support.data import image_data
from tests.support.data import tf_dataset
from tests.support.networks import cnn


def test_against_the_definition() -> None:
    """Mean KL over all inputs, for the perturbations of each seed."""
    x, _ = image_data(40)
    model = cnn(dropout=0.5, seed=0)
    perturbation = keras_nrs.perturbations.RelativeBall()
    result = model_divergence(
        model, x, eps=0.3, perturbation=perturbation, num_samples=3, seed=5
    )
    theta = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]

    def log_p(weights: Any) -> np.ndarray:
        z, _ = model.stateless_call(weights, state, x, training=False)
        z = keras.ops.convert_to_numpy(z).astype("float64")
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    clean = log_p(theta)
    for key, value in zip(keys_of_samples(5, 3), result.values, strict=True):
        deltas = perturbation.sample(theta, 0.3, key)
        perturbed = log_p([w + d for w, d in zip(theta, deltas, strict=True)])
        expected = np.mean(np.sum(np.exp(clean) * (clean - perturbed), axis=1))
        assert value == pytest.approx(expected, rel=1e-4)
    assert result.mean == pytest.approx(np.mean(result.values))
    error = np.std(result.values, ddof=1) / np.sqrt(3)
    assert result.standard_error == pytest.approx(error)


@pytest.mark.matrix
def test_neighbouring_seeds_share_no_perturbation() -> None:
    x, _ = image_data(16)
    model = cnn()
    by_seed = [model_divergence(model, x, eps=1.0, seed=s).values for s in (0, 1)]
    assert not set(by_seed[0]) & set(by_seed[1])
    fewer = model_divergence(model, x, eps=1.0, num_samples=4).values
    np.testing.assert_array_equal(fewer, by_seed[0][:4])
    largest = 2**31 - 1
    assert model_divergence(model, x, eps=1.0, num_samples=2, seed=largest).mean > 0


@pytest.mark.matrix
@pytest.mark.parametrize("form", [tf_dataset, generator])
def test_forms_of_data(form: Any) -> None:
    x, y = image_data(30)
    model = cnn()
    expected = model_divergence(model, x, eps=1.0, num_samples=2).values
    result = model_divergence(model, form(x, y), eps=1.0, num_samples=2)
    np.testing.assert_allclose(result.values, expected, rtol=1e-4)


@pytest.mark.matrix
def test_small_perturbations_see_the_fisher_information() -> None:
    """d(theta, theta + delta) is delta.T F delta / 2, so its mean is a trace."""
    x, y = image_data(32)
    model = cnn()
    operator = hessian_operator(model, x, y, variables="all", curvature="fisher")
    n, eps = operator.shape[0], 0.02
    result = model_divergence(
        model,
        x,
        eps=eps,
        perturbation=keras_nrs.perturbations.Ball(radius="sphere"),
        num_samples=64,
    )
    expected = eps**2 * np.trace(operator.to_dense()) / (2 * n)
    assert abs(result.mean - expected) < 5 * result.standard_error + 0.02 * expected


@pytest.mark.matrix
def test_a_wrapped_model_brings_its_perturbation() -> None:
    x, _ = image_data(16)
    model = cnn()
    wrapped = keras_nrs.wrap(model, perturbation="relative")
    by_wrapped = model_divergence(wrapped, x, eps=0.2, num_samples=2).values
    by_name = model_divergence(
        model, x, eps=0.2, perturbation="relative", num_samples=2
    ).values
    np.testing.assert_array_equal(by_wrapped, by_name)


@pytest.mark.matrix
def test_bad_arguments() -> None:
    x, _ = image_data(16)
    with pytest.raises(ValueError, match="`eps` must be finite and >= 0"):
        model_divergence(cnn(), x, eps=-1.0)
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        model_divergence(cnn(), x, eps=1.0, num_samples=0)
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        model_divergence(3, x, eps=1.0)  # type: ignore[arg-type]
