"""One perturbation for each replica, and for each group of a replica."""

from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.step.batch_objective import _SEED_STRIDE
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.gradients import value_and_gradients
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation

BACKEND = keras.config.backend()
ROUNDING = float(np.finfo("float32").eps)
EPS, ALPHA, SEED = 0.3, 2.0, 5


def devices(num: int) -> AbstractContextManager[Any]:
    """A scope in which models train on that many devices, replicated."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # TensorFlow's collectives mix up several strategies of one process.
        scope: Any = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(num)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        ).scope()
    else:
        names = keras.distribution.list_devices("cpu")[:num]
        scope = keras.distribution.DataParallel(devices=names).scope()
    return scope


def network(kind: str) -> keras.Model:
    """A compiled CNN whose step of SGD subtracts the gradient from the weights."""
    model = cnn(
        batch_norm=kind == "batch_norm",
        dropout=0.5 if kind == "dropout" else 0.0,
        penalty=1e-2,
        seed=11,
        compile=False,
    )
    compile_classifier(model, optimizer=keras.optimizers.SGD(1.0))
    return model


def seeds_of_group(model: keras.Model, state: list[Any], group: int) -> list[Any]:
    """The state with which the dropout masks of a group are drawn."""
    stride = np.array([group * _SEED_STRIDE, 0], "int64").astype("int32")
    weights = set(map(id, model.weights))
    return [
        s if id(v) in weights else s + ops.cast(ops.convert_to_tensor(stride), s.dtype)
        for v, s in zip(model.non_trainable_variables, state, strict=True)
    ]


def by_hand(
    model: keras.Model, x: np.ndarray, y: np.ndarray, num_groups: int
) -> dict[str, Any]:
    """The mean over groups of the batch, each with its own key, of what a step gives.

    Written with `nrs_objective` and without the training step of `keras_nrs`.
    """
    perturbation = keras_nrs.perturbations.RelativeBall()
    weights, state = (
        [ops.convert_to_tensor(value) for value in numpy_values(variables)]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    key = keras.random.SeedGenerator(SEED).next()
    groups: list[Any] = []
    size = len(x) // num_groups
    for i in range(num_groups):
        x_group = ops.convert_to_tensor(x[i * size : (i + 1) * size])
        y_group = ops.convert_to_tensor(y[i * size : (i + 1) * size])
        deltas = perturbation.sample(
            [ops.stop_gradient(w) for w in weights], EPS, RandomStream(key).fold_in(i)
        )
        own_state = seeds_of_group(model, state, i)
        found: dict[str, Any] = {}

        def objective(
            *tensors: Any,
            x: Any = x_group,
            y: Any = y_group,
            deltas: Any = deltas,
            state: Any = own_state,
            found: Any = found,
        ) -> Any:
            y_pred, new_state, losses = model.stateless_call(
                list(tensors), state, x, training=True, return_losses=True
            )
            perturbed, _ = model.stateless_call(
                [t + d for t, d in zip(tensors, deltas, strict=True)],
                state,
                x,
                training=True,
            )
            terms = keras_nrs.nrs_objective(
                y, y_pred, perturbed, loss=model.loss, alpha=ALPHA
            )
            found["divergence"] = ops.stop_gradient(terms.divergence)
            found["state"] = [ops.stop_gradient(s) for s in new_state]
            return terms.total + sum(losses)

        if BACKEND == "jax":
            import jax

            # `found` leaves the function as an auxiliary value.
            def with_found(*tensors: Any, objective: Any = objective) -> Any:
                found: dict[str, Any] = {}
                return objective(*tensors, found=found), found

            argnums = tuple(range(len(weights)))
            (loss, found), gradients = jax.value_and_grad(
                with_found, argnums=argnums, has_aux=True
            )(*weights)
        else:
            loss, gradients = value_and_gradients(objective, weights)
        groups.append(
            {
                "loss": float(loss),
                "divergence": float(ops.convert_to_numpy(found["divergence"])),
                "gradients": [ops.convert_to_numpy(g) for g in gradients],
                "state": [ops.convert_to_numpy(s) for s in found["state"]],
            }
        )
    return {
        "loss": np.mean([g["loss"] for g in groups]),
        "divergence": np.mean([g["divergence"] for g in groups]),
        "gradients": [
            np.mean(gs, axis=0)
            for gs in zip(*(g["gradients"] for g in groups), strict=True)
        ],
        "state": [
            np.mean(s, axis=0) for s in zip(*(g["state"] for g in groups), strict=True)
        ],
    }


def on_devices(num: int, kind: str, **kwargs: Any) -> tuple[keras.Model, Any]:
    """A model on several devices, and the same wrapped."""
    with devices(num):
        model = network(kind)
        return model, wrap(model, **kwargs)


def assert_step_is(
    model: keras.Model,
    nrs: Any,
    x: np.ndarray,
    y: np.ndarray,
    num_groups: int,
    num_devices: int,
) -> None:
    """One step of fit() is the mean over the groups, calculated by hand."""
    expected = by_hand(model, x, y, num_groups)
    before = numpy_values(model.trainable_variables)
    # On TensorFlow a model's strategy is used wherever it trains.
    with devices(num_devices) if BACKEND == "jax" else nullcontext():
        history = nrs.fit(x, y, batch_size=len(x), verbose=0, shuffle=False).history
    after = numpy_values(model.trainable_variables)
    # Sums of fewer than 1,000 terms of order one.
    bound = 1000 * ROUNDING
    for a, b, gradient in zip(before, after, expected["gradients"], strict=True):
        np.testing.assert_allclose(a - b, gradient, rtol=bound, atol=bound)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=bound)
    np.testing.assert_allclose(
        history["model_divergence"], expected["divergence"], rtol=bound, atol=bound
    )
    weights = set(map(id, model.weights))
    for v, value in zip(model.non_trainable_variables, expected["state"], strict=True):
        if id(v) in weights:
            got = ops.convert_to_numpy(v)
            np.testing.assert_allclose(got, value, rtol=bound, atol=bound)


def wrap(model: keras.Model, **kwargs: Any) -> Any:
    defaults = {"eps": EPS, "alpha": ALPHA, "perturbation": "relative", "seed": SEED}
    return keras_nrs.wrap(model, **(defaults | kwargs))


def weights_after(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_devices: int = 1,
    kind: str = "plain",
    batch_size: int = 16,
    epochs: int = 2,
    **kwargs: Any,
) -> list[np.ndarray]:
    """All variables and the history after training with the same seeds."""
    keras.utils.set_random_seed(3)
    with devices(num_devices) if num_devices > 1 else nullcontext():
        model = network(kind)
        model.optimizer.learning_rate = 0.05
        nrs = wrap(model, **kwargs)
        history = nrs.fit(
            x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
        ).history
    values = numpy_values(model.weights)
    return [*values, *(np.array(history[name]) for name in sorted(history))]


def assert_close(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    # A few steps, each of which sums fewer than 1,000 numbers of order one and passes
    # on the errors of the last one, doubled at the most.
    bound = 64 * 1000 * ROUNDING
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


several_devices = pytest.mark.several_devices


@several_devices
@pytest.mark.parametrize("kind", ["plain", "batch_norm", "dropout"])
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_gradient_is_the_mean_over_replicas(num_replicas: int, kind: str) -> None:
    x, y = image_data(16)
    model, nrs = on_devices(num_replicas, kind)
    assert_step_is(model, nrs, x, y, num_replicas, num_replicas)


@pytest.mark.parametrize("kind", ["plain", "batch_norm", "dropout"])
def test_gradient_is_the_mean_over_the_groups_of_a_replica(kind: str) -> None:
    x, y = image_data(15)
    model = network(kind)
    assert_step_is(model, wrap(model, perturbations_per_replica=3), x, y, 3, 1)


@several_devices
def test_groups_of_two_replicas_are_numbered_together() -> None:
    x, y = image_data(16)
    model, nrs = on_devices(2, "dropout", perturbations_per_replica=2)
    assert_step_is(model, nrs, x, y, 4, 2)


@several_devices
@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
def test_a_replica_with_two_groups_is_two_replicas(kind: str) -> None:
    x, y = image_data(32)
    assert_close(
        weights_after(x, y, kind=kind, perturbations_per_replica=2),
        weights_after(x, y, kind=kind, num_devices=2),
    )


@several_devices
@pytest.mark.parametrize("perturbation", ["ball", "relative", "layerwise", "released"])
def test_replicas_with_one_delta_are_one_device(perturbation: str) -> None:
    x, y = image_data(32)
    kwargs = {"perturbation": perturbation}
    together = weights_after(x, y, num_devices=4, sync_perturbation=True, **kwargs)
    assert_close(together, weights_after(x, y, **kwargs))
    apart = weights_after(x, y, num_devices=4, **kwargs)
    assert max(np.abs(a - b).max() for a, b in zip(apart, together, strict=True)) > 1e-3


def test_deltas_of_replicas_and_steps_are_uncorrelated() -> None:
    seeds = keras.random.SeedGenerator(0)
    keys = [seeds.next() for _ in range(3)]
    num = 20_000
    noise = np.stack(
        [
            ops.convert_to_numpy(RandomStream(key).fold_in(i).normal((num,)))
            for key in keys
            for i in range(4)
        ]
    )
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    # 66 pairs of a standard deviation of num ** -0.5: 5 of it have odds of 4e-5.
    assert np.abs(correlation).max() < 5 / np.sqrt(num)


@pytest.mark.parametrize("num_groups", [5, 10])
def test_groups_cover_a_batch_that_they_do_not_divide(num_groups: int) -> None:
    """Batches of 8 and of 5 samples: also with more groups than samples."""
    x, y = image_data(21)
    kwargs: dict[str, Any] = {"perturbation": FixedPerturbation(), "eps": 0.05}
    assert_close(
        weights_after(
            x, y, perturbations_per_replica=num_groups, batch_size=8, **kwargs
        ),
        weights_after(x, y, batch_size=8, **kwargs),
    )


def test_groups_leave_frozen_layers_alone() -> None:
    """Their weights are state that no step changes: it is not even assigned."""
    x, y = image_data(16)
    model = cnn()
    model.layers[0].trainable = False
    compile_classifier(model)
    nrs = wrap(model, perturbations_per_replica=2)
    frozen = model.layers[0].kernel
    before = numpy_values([frozen])
    if BACKEND != "jax":
        frozen.assign = lambda value: pytest.fail("assigned")
    nrs.fit(x, y, batch_size=16, verbose=0)
    assert_equal(numpy_values([frozen]), before)


def test_groups_see_no_divergence_without_a_delta() -> None:
    """Each group compares its own dropout masks and batch moments."""
    x, y = image_data(32)
    model = cnn(dropout=0.5, seed=1)
    nrs = wrap(model, eps=0.0, perturbations_per_replica=4)
    history = nrs.fit(x, y, batch_size=16, verbose=0).history
    assert history["model_divergence"] == [0.0]


@pytest.mark.parametrize("divergence", ["auto", "mean"])
@pytest.mark.parametrize(
    "num_devices", [1, pytest.param(2, marks=pytest.mark.several_devices)]
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


@several_devices
@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
def test_memory_efficient_steps_on_two_devices_are_the_same_steps(kind: str) -> None:
    x, y = image_data(32)
    kwargs = {"kind": kind, "num_devices": 2, "perturbed_fraction": 0.5}
    assert_close(
        weights_after(x, y, memory_efficient=True, **kwargs),
        weights_after(x, y, **kwargs),
    )


@several_devices
@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
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
        {"scheme": "rpr"},
        {"scheme": "baseline"},
        {"normalize": True},
        {"beta": 0.5},
        {"alpha": 0.0, "beta": 0.0},
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
@pytest.mark.parametrize("weights", [None, "sample", "class"])
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
        "mixed_bfloat16",
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


# What only JAX does.


@pytest.mark.only_jax
@pytest.mark.parametrize("size", [6, 7, 3])
def test_a_batch_that_does_not_divide_is_shared_by_fewer_replicas(size: int) -> None:
    """By as many as divide it and the replicas: 2 of 4 take 3 samples each."""
    x, y = image_data(size)
    model, nrs = on_devices(4, "dropout")
    assert_step_is(model, nrs, x, y, np.gcd(size, 4), 4)


@pytest.mark.only_jax
def test_last_batches_that_do_not_divide() -> None:
    """In fit() with validation, evaluate(), predict() and on single batches."""
    x, y = image_data(29)
    kwargs: dict[str, Any] = {"perturbation": FixedPerturbation(), "eps": 0.05}

    def run() -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        model = cnn(batch_norm=False)
        nrs = wrap(model, **kwargs)
        history = nrs.fit(
            x, y, batch_size=8, validation_data=(x, y), shuffle=False, verbose=0
        ).history
        found = [np.array(history[name]) for name in sorted(history)]
        found += [np.array(nrs.evaluate(x, y, batch_size=8, verbose=0))]
        found += [np.array(nrs.predict(x, batch_size=8, verbose=0))]
        found += [np.array(nrs.train_on_batch(x[:5], y[:5]))]
        found += [np.array(nrs.test_on_batch(x[:5], y[:5]))]
        return found + numpy_values(model.weights)

    alone = run()
    with devices(4):
        assert_close(run(), alone)


def sharded(kind: str = "mlp") -> tuple[Any, keras.Model]:
    """Two data replicas, each of whose weights are on two devices."""
    names = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), names)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*wide.*kernel"] = (None, "model")
    layout_map[".*wide.*bias"] = ("model",)
    layout_map[".*narrow.*kernel"] = ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    with distribution.scope():
        model = keras.Sequential(
            [
                keras.Input((16,)),
                layers.Dense(64, activation="tanh", name="wide"),
                layers.Dense(3, name="narrow"),
            ]
        )
        compile_classifier(model, optimizer=keras.optimizers.SGD(1.0, 0.0))
    return distribution, model


@pytest.mark.only_jax
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_sharded_model_takes_the_mean_over_its_data_replicas(
    rng: np.random.Generator, memory_efficient: bool
) -> None:
    x = rng.normal(size=(16, 16)).astype("float32")
    y = rng.integers(0, 3, 16)
    distribution, model = sharded()
    # Drawn by leaf, as the noise of sharded weights is.
    with distribution.scope():
        expected = by_hand(model, x, y, 2)
        before = numpy_values(model.trainable_variables)
        nrs = wrap(model, memory_efficient=memory_efficient)
        history = nrs.fit(x, y, batch_size=16, verbose=0, shuffle=False).history
    after = numpy_values(model.trainable_variables)
    bound = 1000 * ROUNDING
    for a, b, gradient in zip(before, after, expected["gradients"], strict=True):
        np.testing.assert_allclose(a - b, gradient, rtol=bound, atol=bound)
    np.testing.assert_allclose(
        history["model_divergence"], expected["divergence"], rtol=bound
    )


@pytest.mark.only_jax
def test_layouts_stay_and_no_device_gathers_the_weights(
    rng: np.random.Generator,
) -> None:
    import re

    import jax
    from keras_nrs.backend.jax.trainer import PerturbedStep

    x = rng.normal(size=(16, 16)).astype("float32")
    y = rng.integers(0, 3, 16)
    distribution, model = sharded()
    with distribution.scope():
        model.compile(keras.optimizers.Adam(), model.loss)
        nrs = wrap(model)
        nrs.fit(x, y, batch_size=8, verbose=0)
        model.optimizer.build(model.trainable_variables)
        specs = {v.path: v.value.sharding.spec for v in nrs.variables}
        specs |= {v.path: v.value.sharding.spec for v in model.optimizer.variables}
        shapes = {v.path: v.shape for v in model.optimizer.variables}
        nrs.fit(x, y, batch_size=8, epochs=2, verbose=0)
        for variables in (nrs.variables, model.optimizer.variables):
            for v in variables:
                assert v.value.sharding.spec == specs[v.path]
        kernels = [path for path in specs if "wide" in path and "kernel" in path]
        assert len(kernels) == 3  # The weight and Adam's two slots.
        for path in kernels:
            assert specs[path][-1] == "model", (path, shapes.get(path))
        # The program that each device runs, with the shape of every buffer in it.
        state = nrs._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        batch = keras.tree.map_structure(
            lambda t: jax.device_put(
                t, distribution.get_data_layout(t.shape).backend_layout
            ),
            (x[:8], y[:8]),
        )
        step = PerturbedStep(batch, nrs.eps.value, nrs.alpha.value)
        program = jax.jit(nrs.train_step).lower(state, step).compile().as_text()
    buffers = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"[a-z]+[0-9]+\[([0-9,]*)\]", program)
    ]
    kernel = 16 * 64
    assert max(buffers) < kernel
