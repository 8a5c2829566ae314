"""Moments of BatchNorm that are measured again."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs import update_batch_norm
from tests.support.matrix import rest


def arrays(variables: list[Any]) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(name="first"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4),
            layers.BatchNormalization(name="second"),
            layers.Dense(2),
        ]
    )


def test_the_first_layer_has_the_moments_of_all_samples(
    rng: np.random.Generator,
) -> None:
    """Whatever the batches are."""
    model, x = network(), rng.normal(3, 2, size=(13, 6, 6, 2)).astype("float32")
    for v in model.get_layer("first").non_trainable_variables:
        v.assign(np.full(v.shape, np.nan))
    update_batch_norm(model, x, batch_size=5)
    outputs = keras.ops.convert_to_numpy(model.layers[0](x)).astype("float64")
    mean, variance = arrays(model.get_layer("first").non_trainable_variables)
    np.testing.assert_allclose(mean, outputs.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, outputs.var((0, 1, 2)), rtol=1e-5)


def test_deeper_layers_have_those_of_what_training_feeds_them(
    rng: np.random.Generator,
) -> None:
    kept = [layer for layer in network().layers if "drop" not in layer.name]
    model = keras.Sequential([keras.Input((6, 6, 2)), *kept])
    x = rng.normal(3, 2, size=(20, 6, 6, 2)).astype("float32")
    update_batch_norm(model, x, batch_size=20)
    fed = x
    for layer in model.layers[:5]:
        fed = layer(fed, training=True) if layer.name == "first" else layer(fed)
    fed = keras.ops.convert_to_numpy(fed)
    mean, variance = arrays(model.get_layer("second").non_trainable_variables)
    np.testing.assert_allclose(mean, fed.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, fed.var(0), rtol=1e-4)
    # So that in inference, too, what comes out has mean 0 and variance 1.
    normalized = keras.Sequential(model.layers[:6]).predict(x, verbose=0)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-2)


def test_nothing_else_changes(rng: np.random.Generator) -> None:
    model, x = network(), rng.normal(size=(8, 6, 6, 2)).astype("float32")
    kept = [v for v in model.variables if not v.name.startswith("moving")]
    before, momentum = arrays(kept), model.get_layer("first").momentum
    update_batch_norm(model, x, batch_size=4)
    for old, new in zip(before, arrays(kept), strict=True):
        np.testing.assert_array_equal(new, old)
    assert model.get_layer("first").momentum == momentum


def test_frozen_layers_keep_their_moments(rng: np.random.Generator) -> None:
    model, x = network(), rng.normal(size=(8, 6, 6, 2)).astype("float32")
    model.get_layer("first").trainable = False
    update_batch_norm(model, x)
    for v, expected in zip(model.get_layer("first").weights[2:], (0, 1), strict=True):
        np.testing.assert_array_equal(arrays([v])[0], np.full(3, expected))
    assert np.any(arrays([model.get_layer("second").moving_mean])[0] != 0)
    model.get_layer("first").trainable = True
    update_batch_norm(model, x)
    assert np.any(arrays([model.get_layer("first").moving_mean])[0] != 0)


def test_a_layer_that_is_called_twice_has_the_moments_of_both_calls(
    rng: np.random.Generator,
) -> None:
    shared = layers.BatchNormalization()
    inputs = [keras.Input((2,)), keras.Input((2,))]
    model = keras.Model(inputs, layers.add(list(map(shared, inputs))))
    x = [rng.normal(at, 1, (12, 2)).astype("float32") for at in (0, 10)]
    for _ in range(2):
        update_batch_norm(model, x, batch_size=5)
        mean, variance = arrays(shared.weights[2:])
        together = np.concatenate(x).astype("float64")
        np.testing.assert_allclose(mean, together.mean(0), rtol=1e-5)
        np.testing.assert_allclose(variance, together.var(0), rtol=1e-5)


def masked(lengths: list[int], size: int) -> np.ndarray:
    """Sequences of these lengths, which zeros fill up."""
    values = np.random.default_rng(len(lengths)).normal(3, 2, (len(lengths), size, 2))
    return (values * (np.arange(size) < np.array(lengths)[:, None])[..., None]).astype(
        "float32"
    )


@pytest.mark.parametrize("axis", [-1, *rest(1)])
def test_all_unmasked_positions_count_alike(axis: int) -> None:
    """Whatever their number in a batch, and in a batch that has none."""
    layer = layers.BatchNormalization(axis=axis)
    model = keras.Sequential([keras.Input((4, 2)), layers.Masking(), layer])
    x = masked([4, 4, 1, 4, 0, 0], 4)
    update_batch_norm(model, x, batch_size=2)
    counted = [column[np.any(x, -1)[:, i]] for i, column in enumerate(x.swapaxes(0, 1))]
    if axis == -1:
        counted = list(np.concatenate(counted).T)
    mean, variance = arrays(layer.weights[2:])
    np.testing.assert_allclose(mean, [np.mean(c) for c in counted], rtol=1e-5)
    np.testing.assert_allclose(variance, [np.var(c) for c in counted], rtol=1e-5)


@pytest.mark.matrix
def test_batches_of_longer_sequences_count_more() -> None:
    layer = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((None, 2)), layer])
    batches = [masked([size] * 3, size) for size in (2, 9)]
    update_batch_norm(model, ((batch,) for batch in batches))
    together = np.concatenate([batch.reshape(-1, 2) for batch in batches])
    mean, variance = arrays(layer.weights[2:])
    np.testing.assert_allclose(mean, together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, together.var(0), rtol=1e-5)


class FineTuned(keras.Model):
    """Calls its first layer in inference mode, as recipes of fine-tuning do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (layers.BatchNormalization() for _ in range(2))

    def call(self, x: Any, training: bool = False) -> Any:
        return self.second(self.first(x, training=False), training=training)


def test_a_layer_that_is_called_in_inference_mode_keeps_its_moments(
    rng: np.random.Generator,
) -> None:
    """They normalize what the next layer sees."""
    model, x = FineTuned(), rng.normal(3, 2, (8, 2)).astype("float32")
    model(x)
    moments = [np.full(2, value, "float32") for value in (3, 4)]
    for variable, value in zip(model.first.weights[2:], moments, strict=True):
        variable.assign(value)
    update_batch_norm(model, x)
    np.testing.assert_array_equal(arrays(model.first.weights[2:]), moments)
    fed = keras.ops.convert_to_numpy(model.first(x, training=False))
    mean, variance = arrays(model.second.weights[2:])
    np.testing.assert_allclose(mean, fed.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, fed.var(0), rtol=1e-4)


class WithUnused(keras.Model):
    """Has a layer that its `call()` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (
            layers.BatchNormalization(),
            keras.Sequential([keras.Input((2,)), layers.BatchNormalization()]),
        )

    def call(self, x: Any, training: bool = False) -> Any:
        return self.used(x, training=training)


def test_a_layer_that_is_not_called_keeps_its_moments(rng: np.random.Generator) -> None:
    model, x = WithUnused(), rng.normal(3, 2, (8, 2)).astype("float32")
    model(x)
    update_batch_norm(model, x)
    np.testing.assert_allclose(arrays([model.used.moving_mean])[0], x.mean(0), 1e-5)
    mean, variance = arrays(model.unused.layers[-1].weights[2:])
    np.testing.assert_array_equal([mean, variance], [[0, 0], [1, 1]])


def test_a_wrapped_model_and_batches_of_a_generator(rng: np.random.Generator) -> None:
    plain, x = network(), rng.normal(size=(8, 6, 6, 2)).astype("float32")
    plain.compile(loss="mse")
    wrapped = keras_nrs.wrap(plain, 0.1)
    update_batch_norm(wrapped, x, batch_size=4)
    expected = arrays(plain.get_layer("first").weights)
    labels = np.zeros((4, 2))
    update_batch_norm(wrapped, ((part, labels) for part in (x[:4], x[4:])))
    for found, array in zip(
        arrays(plain.get_layer("first").weights), expected, strict=True
    ):
        np.testing.assert_array_equal(found, array)


def test_a_model_without_batch_norm_stays_as_it_is() -> None:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    update_batch_norm(model, np.ones((3, 2)))


@pytest.mark.parametrize(
    "model", [None, keras.Sequential([layers.BatchNormalization()])]
)
def test_a_model_must_be_built(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`model` must be a keras\.Model that is built"
    ):
        update_batch_norm(model, np.ones((3, 2)))


def test_batches_must_hold_samples() -> None:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="`batch_size`"):
        update_batch_norm(model, np.ones((3, 2)), batch_size=0)
