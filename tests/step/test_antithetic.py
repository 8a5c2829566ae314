"""Pairs of deltas, delta and -delta: on two groups, or on the same samples."""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.perturbations import RelativeBall
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_goes_on_alike
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.divergences import softmax
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.replicas import devices

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype("float32")
Y = RNG.integers(0, 3, 16)
EPS, SEED, ALPHA = 0.5, 3, 2.0
TWO = pytest.param(2, marks=pytest.mark.several_devices)


def network() -> keras.Model:
    """f(x) = x W + b, whose step subtracts the gradient."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    compile_classifier(model, optimizer=keras.optimizers.SGD(1.0), metrics=[])
    return model


def delta_of(model: keras.Model, stream: int) -> list[np.ndarray]:
    key = keras.random.SeedGenerator(SEED).next()
    rng = RandomStream(key).fold_in(stream)
    return numpy_values(RelativeBall().sample(model.trainable_variables, EPS, rng))


def gradient(
    theta: list[np.ndarray],
    delta: list[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    scheme: str,
) -> list[np.ndarray]:
    """Of L(theta + delta), or of Equation 3, in float64."""
    q = softmax(x @ (theta[0] + delta[0]) + theta[1] + delta[1])
    error = q - np.eye(3)[y]
    if scheme == "nrs":
        p = softmax(x @ theta[0] + theta[1])
        log_ratio = np.log(p) - np.log(q)
        kl = np.sum(p * log_ratio, axis=1, keepdims=True)
        error += p - np.eye(3)[y] + ALPHA * (p * (log_ratio - kl) + q - p)
    error /= len(x)
    return [x.T @ error, error.sum(axis=0)]


def step(num_devices: int, **options: Any) -> tuple[Any, list[np.ndarray]]:
    """theta, and the gradient with which a step moves it."""
    with devices(num_devices) if num_devices > 1 else nullcontext():
        model = network()
        nrs = keras_nrs.wrap(
            model,
            eps=EPS,
            perturbation="relative",
            normalize=False,
            seed=SEED,
            **options,
        )
    before = numpy_values(model.trainable_variables)
    is_jax = keras.config.backend() == "jax"
    with devices(num_devices) if num_devices > 1 and is_jax else nullcontext():
        nrs.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    after = numpy_values(model.trainable_variables)
    return before, [a - b for a, b in zip(before, after, strict=True)]


SCHEMES = [{"scheme": "nrs", "alpha": ALPHA}, *rest({"scheme": "rpr"})]


@pytest.mark.parametrize(
    ("num_devices", "number", "sync"),
    [
        (1, 4, False),
        pytest.param(2, 1, False, marks=pytest.mark.several_devices),
        *(
            pytest.param(2, 2, s, marks=[pytest.mark.several_devices, pytest.mark.slow])
            for s in (False, True)
        ),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_group_has_the_negative_delta_of_the_first(
    scheme: dict[str, Any], num_devices: int, number: int, sync: bool
) -> None:
    theta, found = step(
        num_devices,
        antithetic=True,
        perturbations_per_replica=number,
        sync_perturbation=sync,
        **scheme,
    )
    num_groups = num_devices * number
    gradients = []
    for i, (x, y) in enumerate(
        zip(np.split(X, num_groups), np.split(Y, num_groups), strict=True)
    ):
        i = i % number if sync else i
        sign = -1 if i % 2 else 1
        delta = [sign * d for d in delta_of(network(), i // 2)]
        gradients.append(gradient(theta, delta, x, y, scheme["scheme"]))
    for got, *want in zip(found, *gradients, strict=True):
        np.testing.assert_allclose(
            got, np.mean(want, axis=0), atol=1000 * ROUNDING, rtol=0
        )


@pytest.mark.parametrize("num_devices", [1, *rest(TWO)])
@pytest.mark.parametrize("options", [*SCHEMES, *rest({"memory_efficient": True})])
def test_the_same_samples_have_both_deltas(
    options: dict[str, Any], num_devices: int
) -> None:
    options = {"scheme": "nrs", "alpha": ALPHA} | options
    theta, found = step(num_devices, antithetic="same_samples", **options)
    gradients = []
    for i, (x, y) in enumerate(
        zip(np.split(X, num_devices), np.split(Y, num_devices), strict=True)
    ):
        delta = delta_of(network(), i)
        for signed in (delta, [-d for d in delta]):
            gradients.append(gradient(theta, signed, x, y, options["scheme"]))
    for got, *want in zip(found, *gradients, strict=True):
        np.testing.assert_allclose(
            got, np.mean(want, axis=0), atol=1000 * ROUNDING, rtol=0
        )


@pytest.mark.matrix
@pytest.mark.parametrize("antithetic", [True, "same_samples"])
def test_a_loss_that_is_linear_in_delta_feels_none(antithetic: Any) -> None:
    """The mean over a pair is the loss at theta, and so is the gradient."""
    # Every group has the same sample.
    x = np.ones((8, 3), "float32")

    def run(**options: Any) -> tuple[float, list[np.ndarray]]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), lambda y_true, y_pred: y_pred)
        trained = keras_nrs.wrap(model, **options) if options else model
        loss = trained.train_on_batch(x, x[:, :1], return_dict=True)["loss"]
        return float(loss), numpy_values(model.trainable_variables)

    options = {"eps": 0.5, "scheme": "rpr", "perturbation": "relative", "seed": 0}
    number = 2 if antithetic is True else 1
    loss, values = run(
        **options, antithetic=antithetic, perturbations_per_replica=number
    )
    plain_loss, plain_values = run()
    assert loss == pytest.approx(plain_loss, abs=100 * ROUNDING)
    assert abs(run(**options)[0] - plain_loss) > 1e-2
    for got, want in zip(values, plain_values, strict=True):
        np.testing.assert_allclose(got, want, atol=100 * ROUNDING)


@pytest.mark.parametrize("scheme", ["nrs", *rest("rpr")])
def test_passes_on_the_same_samples_see_the_same_masks(scheme: str) -> None:
    """Without a delta the three passes are one; in RPR the two are plain Keras's."""
    x, y = image_data(16)

    def run(**options: Any) -> tuple[dict[str, float], list[np.ndarray]]:
        keras.utils.set_random_seed(0)
        model = cnn(dropout=0.5, penalty=1e-2)
        trained = keras_nrs.wrap(model, **options) if options else model
        logs = trained.train_on_batch(x, y, return_dict=True)
        return {k: float(v) for k, v in logs.items()}, numpy_values(model.variables)

    options = {"eps": 0.0, "scheme": scheme, "antithetic": "same_samples", "seed": 1}
    logs, values = run(**options, normalize=True)
    plain_logs, plain = run()
    assert logs["loss"] == pytest.approx(plain_logs["loss"], rel=1e-5)
    assert logs["accuracy"] == plain_logs["accuracy"]
    assert logs.get("model_divergence", 0) == pytest.approx(0, abs=10 * ROUNDING)
    for got, want in zip(values, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1000 * ROUNDING)


@pytest.mark.parametrize(
    "options",
    [
        {"perturbations_per_replica": 2, "memory_efficient": True},
        {"perturbed_fraction": 0.5},
    ],
)
@pytest.mark.matrix
def test_the_same_samples_with_other_options(options: dict[str, Any]) -> None:
    """Without a delta all terms are those of one pair."""
    x, y = image_data(32)
    nrs = keras_nrs.wrap(
        cnn(dropout=0.5), eps=0.0, antithetic="same_samples", **options
    )
    logs = nrs.fit(x, y, batch_size=16, verbose=0).history
    assert logs["model_divergence"] == pytest.approx([0], abs=10 * ROUNDING)
    assert np.isfinite(logs["loss"]).all()


@pytest.mark.matrix
def test_a_delta_without_its_pair_is_an_error() -> None:
    nrs = keras_nrs.wrap(network(), antithetic=True)
    with pytest.raises(ValueError, match="perturbations_per_replica=2, or anti"):
        nrs.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="needs an even number of perturbations"):
        keras_nrs.wrap(
            network(), antithetic=True, perturbations_per_replica=3
        ).train_on_batch(X, Y)


@pytest.mark.only_torch
def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="along the gradient"):
        keras_nrs.wrap(network(), scheme="sam", antithetic=True)
    with pytest.raises(ValueError, match="`antithetic` must be True, False or 'same"):
        keras_nrs.wrap(network(), antithetic="samples")
    with pytest.raises(TypeError, match="`antithetic` must be"):
        keras_nrs.wrap(network(), antithetic=2)


@pytest.mark.matrix
def test_saving(tmp_path: Any) -> None:
    nrs = keras_nrs.wrap(network(), eps=0.1, antithetic="same_samples")
    nrs.fit(X, Y, verbose=0)
    loaded = assert_goes_on_alike(nrs, tmp_path / "pairs.keras", X, Y)
    assert loaded.antithetic == "same_samples"
