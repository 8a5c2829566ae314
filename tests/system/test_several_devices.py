"""Across modules: training on several devices, each with its perturbation."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.arrays import ROUNDING
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.replicas import assert_close
from tests.support.replicas import assert_step_is
from tests.support.replicas import devices
from tests.support.replicas import network
from tests.support.replicas import on_devices
from tests.support.replicas import weights_after
from tests.support.replicas import wrap

BACKEND = keras.config.backend()
several_devices = pytest.mark.several_devices


@several_devices
@pytest.mark.parametrize("kind", ["dropout", *rest("plain", "batch_norm")])
@pytest.mark.parametrize("num_replicas", [2, *rest(4)])
def test_gradient_is_the_mean_over_replicas(num_replicas: int, kind: str) -> None:
    x, y = image_data(16)
    model, nrs = on_devices(num_replicas, kind)
    assert_step_is(model, nrs, x, y, num_replicas, num_replicas)


@several_devices
def test_groups_of_two_replicas_are_numbered_together() -> None:
    x, y = image_data(16)
    model, nrs = on_devices(2, "dropout", perturbations_per_replica=2)
    assert_step_is(model, nrs, x, y, 4, 2)


@several_devices
@pytest.mark.parametrize("kind", ["batch_norm", *rest("dropout")])
def test_a_replica_with_two_groups_is_two_replicas(kind: str) -> None:
    x, y = image_data(32)
    assert_close(
        weights_after(x, y, kind=kind, perturbations_per_replica=2),
        weights_after(x, y, kind=kind, num_devices=2),
    )


@several_devices
@pytest.mark.parametrize(
    "perturbation",
    [
        "filterwise",
        *rest("ball", "relative", "layerwise", "elementwise", "released"),
    ],
)
def test_replicas_with_one_delta_are_one_device(perturbation: str) -> None:
    x, y = image_data(32)
    kwargs = {"perturbation": perturbation}
    together = weights_after(x, y, num_devices=2, sync_perturbation=True, **kwargs)
    assert_close(together, weights_after(x, y, **kwargs))
    apart = weights_after(x, y, num_devices=2, **kwargs)
    assert max(np.abs(a - b).max() for a, b in zip(apart, together, strict=True)) > 1e-3


@pytest.mark.matrix
@several_devices
def test_replicas_follow_one_schedule() -> None:
    """Those with one delta are one device, and all show the value in use."""
    x, y = image_data(32)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 4, 0.5)
    kwargs = {"eps": schedule, "alpha": schedule, "sync_perturbation": True}
    together = weights_after(x, y, num_devices=4, **kwargs)
    assert_close(together, weights_after(x, y, **kwargs))
    with devices(4):
        nrs = wrap(network("plain"), **kwargs)
        nrs.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert float(keras.ops.convert_to_numpy(nrs.eps)) == pytest.approx(0.4)


@pytest.mark.parametrize("divergence", ["auto", *rest("mean")])
@pytest.mark.parametrize(
    "num_devices", [*rest(1), pytest.param(2, marks=pytest.mark.several_devices)]
)
def test_a_summed_loss_is_the_sum_over_the_batch(
    num_devices: int, divergence: str
) -> None:
    x, y = image_data(16)
    rng = np.random.default_rng(0)
    values: Any = None

    def gradient(**kwargs: Any) -> list[np.ndarray]:
        nonlocal values
        model = network("plain")
        if values is None:
            values = [0.3 * rng.normal(size=w.shape) for w in model.get_weights()]
        model.set_weights(values)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        )
        model.compile(keras.optimizers.SGD(0.01), loss)
        if divergence == "mean":
            kl = keras_nrs.divergences.CategoricalKL(from_logits=True)
            kwargs["divergence"] = kl
        nrs = wrap(model, perturbation=FixedPerturbation(), eps=0.05, **kwargs)
        nrs.fit(x, y, batch_size=16, verbose=0)
        value = float(loss(y[:1], np.zeros((1, 3))))
        assert value == pytest.approx(np.log(3), rel=1e-5)
        return numpy_values(model.trainable_variables)

    expected = gradient()
    if num_devices == 1:
        # With 20 groups of 16 samples some are empty.
        for num_groups in (4, 20):
            assert_close(gradient(perturbations_per_replica=num_groups), expected)
    else:
        with devices(num_devices):
            assert_close(gradient(perturbations_per_replica=2), expected)


@several_devices
def test_a_model_is_wrapped_where_it_was_made() -> None:
    """Outside the scope of its devices."""
    x, y = image_data(16)
    with devices(2):
        model = network("plain")
    nrs = wrap(model)
    assert_step_is(model, nrs, x, y, 2, 2)


@several_devices
def test_moving_between_devices_makes_the_step_anew() -> None:
    x, y = image_data(16)
    model = network("plain")
    nrs = wrap(model, perturbation=FixedPerturbation(), eps=0.05)
    if BACKEND == "tensorflow":
        # A strategy is a model's for life.
        assert nrs.distribute_strategy is model.distribute_strategy
        return
    nrs.fit(x, y, verbose=0)
    first = nrs.train_function
    with devices(1):
        nrs.make_train_function()
    assert nrs.train_function is not first


@pytest.mark.matrix
@several_devices
@pytest.mark.parametrize("kind", ["dropout", "batch_norm"])
def test_memory_efficient_steps_on_two_devices_are_the_same_steps(kind: str) -> None:
    x, y = image_data(32)
    kwargs = {"kind": kind, "num_devices": 2, "perturbed_fraction": 0.5}
    assert_close(
        weights_after(x, y, memory_efficient=True, **kwargs),
        weights_after(x, y, **kwargs),
    )


@several_devices
@pytest.mark.parametrize("kind", ["batch_norm", *rest("dropout")])
def test_shares_on_two_devices_see_no_divergence_without_a_delta(kind: str) -> None:
    x, y = image_data(32)
    with devices(2):
        nrs = wrap(network(kind), eps=0.0, perturbed_fraction=0.4)
        history = nrs.fit(x, y, batch_size=16, verbose=0).history
    # Of equal outputs, which may be rounded differently. With other masks it is 0.2.
    assert history["model_divergence"] == pytest.approx([0], abs=10 * ROUNDING)


@several_devices
@pytest.mark.parametrize(
    "kwargs",
    [
        {"interval": 2},
        *rest(
            {"scheme": "rpr"},
            {"scheme": "baseline"},
            {"normalize": True},
            {"beta": 0.5},
            {"alpha": 0.0, "beta": 0.0},
        ),
    ],
    ids=str,
)
def test_options_on_two_devices(kwargs: dict[str, Any]) -> None:
    """With the same delta everywhere, two devices are one."""
    x, y = image_data(32)
    kwargs = {"perturbation": FixedPerturbation(), "eps": 0.05} | kwargs
    assert_close(
        weights_after(x, y, num_devices=2, **kwargs), weights_after(x, y, **kwargs)
    )


def functional() -> keras.Model:
    """Two named inputs and two named outputs."""
    inputs = {name: keras.Input((4,), name=name) for name in "ab"}
    features = layers.Dense(8, activation="tanh")(
        layers.Concatenate()([inputs["a"], inputs["b"]])
    )
    model = keras.Model(
        inputs,
        {
            "class": layers.Dense(3, name="class")(features),
            "value": layers.Dense(1, name="value")(features),
        },
    )
    model.compile(
        keras.optimizers.SGD(0.05),
        {
            "class": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "value": "mse",
        },
        metrics={"class": "accuracy"},
        # TensorFlow's trainer fails with several steps on several devices.
        steps_per_execution=2 if BACKEND == "jax" else 1,
    )
    return model


@several_devices
@pytest.mark.parametrize("weights", ["class", *rest(None, "sample")])
def test_dicts_and_weights_on_two_devices(
    weights: str | None, rng: np.random.Generator
) -> None:
    a, b = rng.normal(size=(2, 32, 4)).astype("float32")
    labels = {
        "class": rng.integers(0, 3, 32),
        "value": rng.normal(size=(32, 1)).astype("float32"),
    }
    kwargs: dict[str, Any] = {}
    if weights == "sample":
        kwargs["sample_weight"] = {
            name: rng.uniform(size=32).astype("float32") for name in labels
        }

    def run() -> list[np.ndarray]:
        keras.utils.set_random_seed(4)
        model = functional()
        target: Any = labels
        if weights == "class":
            inputs = {i.name: i for i in model.inputs}
            model = keras.Model(inputs, model.outputs[0])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(0.05), loss, weighted_metrics=["acc"])
            kwargs["class_weight"] = {0: 0.2, 1: 1.0, 2: 3.0}
            target = labels["class"]
        nrs = wrap(model, perturbation=FixedPerturbation(), eps=0.05)
        history = nrs.fit(
            {"a": a, "b": b},
            target,
            batch_size=8,
            shuffle=False,
            verbose=0,
            **kwargs,
        ).history
        nrs.train_on_batch(
            {"a": a[:4], "b": b[:4]}, keras.tree.map_structure(lambda t: t[:4], target)
        )
        values = [np.array(history[name]) for name in sorted(history)]
        return numpy_values(model.weights) + values

    alone = run()
    with devices(2):
        assert_close(run(), alone)


@several_devices
@pytest.mark.parametrize(
    "policy",
    [
        *rest("mixed_bfloat16"),
        # On TensorFlow, Keras looks for overflows on the first replica alone.
        pytest.param("mixed_float16", marks=pytest.mark.only_jax),
    ],
)
def test_mixed_precision_on_two_devices(policy: str) -> None:
    x, y = image_data(32)
    keras.config.set_dtype_policy(policy)
    try:
        with devices(2):
            model = cnn(dropout=0.5)
            history = wrap(model).fit(x, y, batch_size=8, epochs=3, verbose=0).history
    finally:
        keras.config.set_dtype_policy("float32")
    assert history["loss"][-1] < history["loss"][0]
    assert all(w.dtype == np.float32 for w in model.get_weights())


@pytest.mark.matrix
@several_devices
def test_masks_reach_the_loss_and_the_metrics_on_two_devices(
    rng: np.random.Generator,
) -> None:
    x = rng.integers(0, 5, (16, 6))
    y = rng.integers(0, 3, (16, 6))

    def run(**kwargs: Any) -> list[np.ndarray]:
        keras.utils.set_random_seed(4)
        model = keras.Sequential(
            [keras.Input((6,)), layers.Embedding(5, 4, mask_zero=True), layers.Dense(3)]
        )
        compile_classifier(model)
        nrs = wrap(model, perturbation=FixedPerturbation(), eps=0.05, **kwargs)
        history = nrs.fit(x, y, batch_size=16, verbose=0).history
        # Keras gives each replica's loss the same weight, whatever its mask leaves.
        return [np.array(history["accuracy"])]

    alone = run()
    assert_close(run(perturbations_per_replica=2), alone)
    with devices(2):
        assert_close(run(), alone)


@pytest.mark.only_tensorflow  # Its strategies divide losses by their replicas.
def test_measurements_in_a_scope_are_those_outside() -> None:
    x, y = image_data(16)
    with devices(2):
        nrs = wrap(network("plain"))

    def measured() -> list[float]:
        flatness = keras_nrs.flatness
        of_loss, of_outputs = (
            flatness.hessian_eigenvalues(nrs, x, y, curvature=curvature)
            for curvature in ("hessian", "fisher")
        )
        around = flatness.sharpness(nrs, x, y, eps=0.1, num_samples=1, num_starts=1)
        divergence = flatness.model_divergence(nrs, x, num_samples=2, eps=0.1)
        eps = keras_nrs.calibrate_eps(nrs, x, target_divergence=0.05, num_samples=2)
        return [
            of_loss.eigenvalues[0],
            of_outputs.eigenvalues[0],
            around.loss,
            divergence.mean,
            float(eps),
        ]

    outside = measured()
    with devices(2):
        np.testing.assert_allclose(measured(), outside, rtol=1e-3)
