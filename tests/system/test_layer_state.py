"""Across modules: what layers assign, count, draw and add in a pass."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from tests.support.asserts import numpy_values
from tests.support.conformance_layers import AddingLoss
from tests.support.conformance_layers import Measuring
from tests.support.matrix import rest
from tests.support.networks import compile_classifier

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = np.arange(32) % 3


class Noise(layers.Layer):
    """Adds noise from Keras's global generator."""

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x))


NETWORKS: dict[str, Callable[[], list[Any]]] = {
    "assigned weights": lambda: [layers.SpectralNormalization(layers.Dense(4))],
    "metric": lambda: [Measuring()],
    "losses": lambda: [layers.Dense(4, activity_regularizer="l2"), AddingLoss()],
}


def network(name: str, rate: float) -> keras.Model:
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), *NETWORKS[name](), layers.Dense(3)])
    compile_classifier(model, optimizer=keras.optimizers.SGD(rate))
    return model


def fit(model: keras.Model) -> dict[str, list[float]]:
    history = model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    logs: dict[str, list[float]] = history.history
    return logs


@pytest.mark.not_jax
@pytest.mark.parametrize("memory_efficient", [False, *rest(True)])
@pytest.mark.parametrize("name", ["assigned weights", "metric", *rest("losses")])
def test_a_clean_pass_keeps_what_plain_keras_keeps(
    name: str, memory_efficient: bool
) -> None:
    plain, model = network(name, 0.05), network(name, 0.05)
    expected = fit(plain)
    nrs = keras_nrs.wrap(
        model, eps=0.0, normalize=True, memory_efficient=memory_efficient
    )
    logs = fit(nrs)
    # 12 steps, each of which rounds the sum of two equal gradients once more.
    for a, b in zip(
        numpy_values(plain.variables), numpy_values(model.variables), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    for log, values in expected.items():
        np.testing.assert_allclose(logs[log], values, rtol=1e-5)


@pytest.mark.not_jax
def test_draws_of_the_global_generator_differ_from_step_to_step() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), Noise(), layers.Dense(3)])
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.0))
    nrs = keras_nrs.wrap(model, eps=0.0)
    logs = [nrs.train_on_batch(X, Y, return_dict=True) for _ in range(3)]
    # `loss` is the mean so far: the first of three different values stays in it.
    assert len({float(log["loss"]) for log in logs}) == 3
    # Both passes draw the same numbers.
    assert all(abs(float(log["model_divergence"])) < 1e-6 for log in logs)


@pytest.mark.matrix
@pytest.mark.not_jax
@pytest.mark.parametrize("scheme", ["nrs", "sam"])
def test_groups_continue_what_others_counted_and_drew(scheme: str) -> None:
    """With a share of the batch: a group with a perturbed pass, and one without it."""
    drawn: list[Any] = []

    class Recorder(Noise):
        def call(self, x: Any) -> Any:
            outputs = super().call(x)
            if outputs.shape[0] == 8:
                drawn.append(ops.convert_to_numpy(outputs - x).copy())
            return outputs

    inner = [Measuring(), Recorder(), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((6,)), *inner, layers.Dense(3)])
    compile_classifier(model, run_eagerly=True)
    nrs = keras_nrs.wrap(model, scheme=scheme, perturbed_fraction=0.5)
    logs = nrs.train_on_batch(X[:16], Y[:16], return_dict=True)
    expected = np.mean(np.abs(X[:16]))
    assert float(logs["size"]) == pytest.approx(expected, rel=1e-5)
    assert np.max(np.abs(drawn[-2] - drawn[-1])) > 0.1


@pytest.mark.not_jax
def test_groups_draw_other_numbers_of_the_global_generator() -> None:
    seen: list[Any] = []

    class Recorder(Noise):
        def call(self, x: Any) -> Any:
            outputs = super().call(x)
            if outputs.shape[0] == 16:
                seen.append(np.array(ops.convert_to_numpy(outputs - x)))
            return outputs

    model = keras.Sequential([keras.Input((6,)), Recorder(), layers.Dense(3)])
    compile_classifier(model, run_eagerly=True)
    nrs = keras_nrs.wrap(model, eps=0.0, perturbations_per_replica=2)
    logs = nrs.train_on_batch(X, Y, return_dict=True)
    first, second, *clean = seen[-4:]
    assert np.max(np.abs(first - second)) > 0.1
    # Both passes of a group draw the same.
    np.testing.assert_allclose(clean, [first, second], atol=1e-6)
    assert abs(float(logs["model_divergence"])) < 1e-6


@pytest.mark.only_tensorflow
@pytest.mark.parametrize("run_eagerly", [False, *rest(True)])
def test_numbers_that_no_second_pass_can_draw_are_refused(run_eagerly: bool) -> None:
    import tensorflow as tf

    class Sampling(layers.Layer):
        @tf.function
        def noise(self, x: Any) -> Any:
            return tf.random.normal(tf.shape(x))

        def call(self, x: Any) -> Any:
            return x + self.noise(x)

    model = keras.Sequential([keras.Input((6,)), Sampling(), layers.Dense(3)])
    compile_classifier(model, run_eagerly=run_eagerly)
    before = numpy_values(model.variables)
    nrs = keras_nrs.wrap(model, eps=0.0)
    with pytest.raises(ValueError, match="must draw random numbers"):
        nrs.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="RandomStandardNormal"):
        keras_nrs.flatness.model_divergence(model, X, eps=0.1)
    for a, b in zip(before, numpy_values(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)


class Plus(keras_nrs.perturbations.Perturbation):
    """delta is eps everywhere."""

    def sample(self, weights: Any, eps: Any, rng: Any) -> list[Any]:
        return [eps * ops.ones_like(weight) for weight in weights]


class Temperature(keras.Model):
    """Its loss is a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = layers.Dense(3)
        self.temperature = self.add_weight(shape=(1,), initializer="ones")

    def call(self, x: Any) -> Any:
        return self.head(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return ops.mean(self.temperature)


def test_weights_of_a_loss_are_perturbed() -> None:
    model = Temperature()
    model(X)
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.0), metrics=[])
    divergence = keras_nrs.divergences.CategoricalKL(from_logits=True)
    nrs = keras_nrs.wrap(
        model,
        eps=1.0,
        perturbation=Plus(),
        divergence=divergence,
        normalize=False,
    )
    logs = nrs.train_on_batch(X, Y, return_dict=True)
    assert float(logs["perturbed_loss"]) == pytest.approx(2.0)
    assert float(logs["loss"]) == pytest.approx(3.0, abs=1e-6)


class Weighs(keras.Model):
    """Its own loss has a share of the losses of layers."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.norm = layers.BatchNormalization(gamma_regularizer="l2")
        self.head = layers.Dense(6, kernel_regularizer="l2", activity_regularizer="l2")

    def call(self, x: Any) -> Any:
        return self.head(self.norm(x))

    def compute_loss(self, x: Any, y: Any, y_pred: Any, *_: Any, **__: Any) -> Any:
        loss = ops.mean(ops.square(ops.subtract(y_pred, x)))
        return loss + self.share * sum(self.losses) if self.share else loss


@pytest.mark.matrix
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "rpr"},
        {"scheme": "sam"},
        {"perturbations_per_replica": 2},
        {"perturbed_fraction": 0.5},
    ],
    ids=str,
)
def test_penalties_count_as_in_a_loss_of_ones_own(
    options: dict[str, Any], share: float
) -> None:
    def loss(**options: Any) -> float:
        keras.utils.set_random_seed(0)
        model: Any = Weighs(share)
        model(X)
        model.compile(keras.optimizers.SGD(0.0))
        if options:
            divergence = keras_nrs.divergences.GaussianKL()
            model = keras_nrs.wrap(model, eps=0.0, divergence=divergence, **options)
        # Equal samples: the losses of all shares of the batch are equal.
        return float(
            model.train_on_batch(np.tile(X[:1], (8, 1)), return_dict=True)["loss"]
        )

    assert loss(normalize=True, **options) == pytest.approx(loss(), rel=1e-5)


class Autoencoder(keras.Model):
    """All of its loss comes from `add_loss()`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = layers.Dense(2, kernel_regularizer="l2")
        self.decoder = layers.Dense(6)

    def call(self, x: Any) -> Any:
        outputs = self.decoder(self.encoder(x))
        self.add_loss(ops.mean(ops.square(outputs - x)))
        return outputs


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["nrs", "rpr"])
def test_added_losses_are_part_of_the_perturbed_loss(scheme: str) -> None:
    model = Autoencoder()
    model(X)
    model.compile(keras.optimizers.SGD(0.0))
    weights = numpy_values(model.trainable_variables)
    nrs = keras_nrs.wrap(
        model,
        eps=0.1,
        scheme=scheme,
        perturbation=Plus(),
        divergence=keras_nrs.divergences.GaussianKL(),
        normalize=False,
    )
    logs = nrs.train_on_batch(X, return_dict=True)

    def outputs(shift: float) -> np.ndarray:
        kernel, bias, decoder, decoder_bias = (w + shift for w in weights)
        return (X @ kernel + bias) @ decoder + decoder_bias

    clean, perturbed = (np.mean((outputs(s) - X) ** 2) for s in (0.0, 0.1))
    divergence = 0.5 * np.mean((outputs(0.0) - outputs(0.1)) ** 2)
    # The default of "l2" is 0.01. It counts once, at theta.
    penalty = 0.01 * np.sum(weights[0] ** 2)
    total = perturbed + penalty
    if scheme == "nrs":
        total += clean + divergence
    assert float(logs["perturbed_loss"]) == pytest.approx(perturbed, rel=1e-5)
    assert float(logs["loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.only_torch
def test_modules_of_torch_cannot_be_perturbed() -> None:
    import torch

    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.TorchModuleWrapper(torch.nn.Linear(6, 4)),
            layers.Dense(3),
        ]
    )
    compile_classifier(model)
    nrs = keras_nrs.wrap(model, eps=0.1)
    with pytest.raises(ValueError, match="TorchModuleWrapper, whose own weights"):
        nrs.train_on_batch(X, Y)
    model.layers[0].trainable = False
    assert float(nrs.train_on_batch(X, Y, return_dict=True)["model_divergence"]) > 0


@pytest.mark.parametrize("num_groups", [2, *rest(1)])
def test_scales_of_float8_layers_are_statistics_of_the_clean_pass(
    num_groups: int,
) -> None:
    def trained(**kwargs: Any) -> dict[str, np.ndarray]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
        model.layers[0].quantize("float8")
        compile_classifier(model, optimizer=keras.optimizers.SGD(0.0), metrics=[])
        fit(keras_nrs.wrap(model, **kwargs) if kwargs else model)
        return {v.name: ops.convert_to_numpy(v) for v in model.variables}

    plain = trained()
    found = trained(
        eps=1.0, alpha=0.0, normalize=False, perturbations_per_replica=num_groups
    )
    names = [name for name in plain if "scale" in name or "amax" in name]
    assert len(names) == 6
    for name in names:
        share = found[name] / np.where(plain[name] == 0, 1, plain[name])
        if num_groups == 1 or "kernel" in name:
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-5)
        else:  # The mean over the groups of their largest values.
            assert np.all((share <= 1.1) & ((share > 0.5) | (plain[name] == 0)))
