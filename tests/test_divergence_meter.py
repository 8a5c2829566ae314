"""The divergence of a batch, and the keys of its perturbations."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_nrs
from keras_nrs.batches import Batches
from keras_nrs.divergence_meter import divergence_meter
from keras_nrs.divergence_meter import keys_of_samples
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.perturbations import FixedPerturbation

X, _ = image_data(8)


def test_equal_arguments_give_the_same_meter() -> None:
    model, perturbation = cnn(), FixedPerturbation()
    meters = [
        divergence_meter(model, perturbation=perturbation, divergence=None)
        for _ in range(2)
    ]
    assert meters[0] is meters[1]
    assert meters[0] is not divergence_meter(
        model, perturbation=FixedPerturbation(), divergence=None
    )


def test_a_wrapped_models_own_perturbation_is_measured() -> None:
    model = cnn()
    nrs = keras_nrs.wrap(model, perturbation=FixedPerturbation())
    meter = divergence_meter(nrs, perturbation=None, divergence=None)
    assert meter.perturbation is nrs.perturbation
    (batch,) = Batches(model, X)
    (key,) = keys_of_samples(0, 1)
    clean = meter.outputs(batch)
    assert meter.divergence(batch, clean, 0.0, key) == pytest.approx(0.0, abs=1e-7)
    weights = [ops.convert_to_tensor(v.value) for v in model.trainable_variables]
    deltas = FixedPerturbation().sample(weights, 0.1, None)
    perturbed, _ = model.stateless_call(
        [w + d for w, d in zip(weights, deltas, strict=True)],
        [v.value for v in model.non_trainable_variables],
        X,
        training=False,
    )
    p, q = (np.array(ops.convert_to_numpy(ops.softmax(z))) for z in (clean, perturbed))
    expected = np.mean(np.sum(p * np.log(p / q), axis=1))
    measured = meter.divergence(batch, clean, 0.1, key)
    assert measured == pytest.approx(expected, rel=1e-4)


def test_keys_differ_between_samples_and_seeds() -> None:
    keys = [
        tuple(map(int, ops.convert_to_numpy(key)))
        for seed in range(3)
        for key in keys_of_samples(seed, 4)
    ]
    assert len(set(keys)) == 12


def test_only_models_are_measured() -> None:
    with pytest.raises(TypeError, match=r"must be a keras\.Model"):
        divergence_meter(keras.layers.Dense(1), perturbation=None, divergence=None)
