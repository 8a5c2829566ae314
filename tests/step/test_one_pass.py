"""RPR in one pass: plain Keras's step, at theta + delta."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs.backend import RandomStream
from tests.benchmarks.memory import lowered_step
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.replicas import devices
from tests.support.replicas import network
from tests.support.run_time import count_at_run_time
from tests.support.run_time import wait_for_device

BACKEND = keras.config.backend()
EPS, SEED = 0.3, 5
TWO = pytest.param(2, marks=pytest.mark.several_devices)


def trained(**options: Any) -> tuple[list[np.ndarray], dict[str, list[float]]]:
    """All variables and the history; of plain Keras without options."""
    x, y = image_data(32)
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, penalty=1e-2)
    entropy = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    compile_classifier(model, metrics=["accuracy", entropy])
    wrapped = keras_nrs.wrap(model, seed=1, **options) if options else model
    history = wrapped.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return numpy_values(model.variables + model.optimizer.variables), history.history


@pytest.mark.parametrize(
    "options",
    [
        {"perturbation": "relative"},
        *rest(
            {"perturbation": "filterwise", "interval": 2}, {"memory_efficient": True}
        ),
    ],
)
def test_without_a_delta_it_is_plain_keras(options: dict[str, Any]) -> None:
    """Bit for bit, with BatchNorm, dropout, a penalty and metrics."""
    plain, logs = trained()
    found, own_logs = trained(eps=0.0, scheme="rpr", **options)
    assert set(own_logs) - set(logs) == {"perturbed_loss"}
    # On JAX the suite compiles without a part of XLA, and programs round otherwise.
    bound = 1000 * ROUNDING if BACKEND == "jax" else 0
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
    for name, values in logs.items():
        np.testing.assert_allclose(own_logs[name], values, rtol=bound)


def at_deltas(
    make: Any, x: np.ndarray, y: np.ndarray, *, num_groups: int, streams: list[int]
) -> list[np.ndarray]:
    """The means over groups of plain steps at theta + delta, without any penalty."""
    key = keras.random.SeedGenerator(SEED).next()
    found = []
    for number, (x_group, y_group) in enumerate(
        zip(np.split(x, num_groups), np.split(y, num_groups), strict=True)
    ):
        model = make()
        deltas = keras_nrs.perturbations.RelativeBall().sample(
            model.trainable_variables, EPS, RandomStream(key).fold_in(streams[number])
        )
        there = [
            a + b
            for a, b in zip(
                numpy_values(model.trainable_variables),
                numpy_values(deltas),
                strict=True,
            )
        ]
        for variable, value in zip(model.trainable_variables, there, strict=True):
            variable.assign(value)
        logs = model.train_on_batch(x_group, y_group, return_dict=True)
        after = numpy_values(model.trainable_variables)
        found.append(
            [
                np.array(float(logs["loss"])),
                np.array(float(logs["accuracy"])),
                *(a - b for a, b in zip(there, after, strict=True)),
                *numpy_values(model.layers[1].non_trainable_variables),
            ]
        )
    return [np.mean(of_each, axis=0) for of_each in zip(*found, strict=True)]


@pytest.mark.parametrize("num_devices", [1, TWO])
@pytest.mark.parametrize(
    "options",
    [
        {},
        *rest(
            {"perturbations_per_replica": 2},
            {"perturbations_per_replica": 2, "sync_perturbation": True},
            {"run_eagerly": True},
        ),
    ],
)
def test_a_step_is_plain_keras_at_theta_plus_delta(
    options: dict[str, Any], num_devices: int
) -> None:
    """Gradient, loss, metrics and BatchNorm statistics: means over the groups."""
    x, y = image_data(16)

    def make() -> keras.Model:
        keras.utils.set_random_seed(0)
        model = cnn(compile=False)
        compile_classifier(model, optimizer=keras.optimizers.SGD(1.0))
        return model

    own = dict(options)
    is_eager = own.pop("run_eagerly", False)
    number = own.get("perturbations_per_replica", 1)
    num_groups = num_devices * number
    streams = list(range(num_groups))
    if own.get("sync_perturbation"):
        streams = list(range(number)) * num_devices
    expected = at_deltas(make, x, y, num_groups=num_groups, streams=streams)
    with devices(num_devices) if num_devices > 1 else nullcontext():
        model = make()
        model.run_eagerly = is_eager
        nrs = keras_nrs.wrap(
            model, eps=EPS, scheme="rpr", perturbation="relative", seed=SEED, **own
        )
    before = numpy_values(model.trainable_variables)
    is_jax = keras.config.backend() == "jax"
    with devices(num_devices) if num_devices > 1 and is_jax else nullcontext():
        logs = nrs.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    after = numpy_values(model.trainable_variables)
    found = [
        np.array(logs["loss"][0]),
        np.array(logs["accuracy"][0]),
        *(a - b for a, b in zip(before, after, strict=True)),
        *numpy_values(model.layers[1].non_trainable_variables),
    ]
    for got, want in zip(found, expected, strict=True):
        # Sums of fewer than 1,000 terms of order one.
        np.testing.assert_allclose(got, want, rtol=0, atol=1000 * ROUNDING)
    assert logs["perturbed_loss"] == logs["loss"]


def test_it_is_rpr_with_a_clean_pass_but_for_statistics() -> None:
    """Without BatchNorm both train the same; penalties count once, at theta."""
    x, y = image_data(32)

    def run(**options: Any) -> tuple[list[np.ndarray], dict[str, list[float]]]:
        keras.utils.set_random_seed(0)
        model = network("dropout")
        model.optimizer.learning_rate = 0.05
        nrs = keras_nrs.wrap(
            model, eps=EPS, perturbation="relative", scheme="rpr", seed=1, **options
        )
        logs = nrs.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        return numpy_values(model.variables), logs

    values, logs = run()
    expected, clean_logs = run(clean_pass=True)
    for got, want in zip(values, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=16 * 1000 * ROUNDING)
    assert set(clean_logs) - set(logs) == {"model_divergence"}
    for name in ("loss", "perturbed_loss"):
        assert logs[name] == pytest.approx(clean_logs[name], rel=1e-4)
    assert logs["accuracy"] != clean_logs["accuracy"]


class Counted(keras.Model):
    """Says when it is called, and has weights in its own loss."""

    def __init__(self, passes: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.head = layers.Dense(1)
        self.count = passes

    def build(self, input_shape: Any) -> None:
        self.head.build(input_shape)

    def call(self, x: Any) -> Any:
        self.count()
        return self.head(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + ops.sum(self.head.kernel)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1), *rest(pytest.param({"clean_pass": True}, 2))],
    ids=str,
)
def test_a_step_runs_the_model_once(options: dict[str, Any], expected: int) -> None:
    passes: list[int] = []
    x = np.ones((24, 3), "float32")
    model = Counted(lambda: count_at_run_time(passes))
    model.compile("sgd", "mse", jit_compile=False if BACKEND != "jax" else "auto")
    model.build((8, 3))
    nrs = keras_nrs.wrap(
        model, scheme="rpr", divergence=keras_nrs.divergences.GaussianKL(), **options
    )
    nrs.fit(x, x[:, :1], batch_size=8, verbose=0)
    wait_for_device()
    passes.clear()  # Keras may have built the model by one.
    nrs.fit(x, x[:, :1], batch_size=8, verbose=0)
    wait_for_device()
    assert len(passes) == 3 * expected


def test_a_loss_of_the_models_own_sees_the_perturbed_weights() -> None:
    x = np.zeros((8, 3), "float32")
    model = Counted()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.build((8, 3))
    kernel = model.head.kernel
    (delta, _) = FixedPerturbation().sample(model.trainable_variables, 0.5, None)
    expected = float(np.sum(ops.convert_to_numpy(kernel) + ops.convert_to_numpy(delta)))
    options = {"scheme": "rpr", "perturbation": FixedPerturbation(), "eps": 0.5}
    bias = float(0.5 * np.cos(1.0))
    logs = keras_nrs.wrap(model, **options).train_on_batch(
        x, x[:, :1], return_dict=True
    )
    assert float(logs["loss"]) == pytest.approx(expected + bias**2, rel=1e-5)


@pytest.mark.matrix
def test_a_loss_without_a_known_divergence_will_do() -> None:
    x, y = image_data(16)
    model = cnn(compile=False)
    model.compile("sgd", lambda y_true, y_pred: ops.max(ops.abs(y_pred), axis=-1))
    logs = keras_nrs.wrap(model, eps=0.1, scheme="rpr").fit(x, y, verbose=0).history
    assert set(logs) == {"loss", "perturbed_loss"}


class GlobalNoise(layers.Layer):
    """Draws from TensorFlow's own generator, which no state of a model repeats."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return x + 0.1 * tf.random.normal(tf.shape(x))


@pytest.mark.only_tensorflow
def test_draws_need_not_repeat() -> None:
    x = np.ones((8, 3), "float32")
    model = keras.Sequential([keras.Input((3,)), GlobalNoise(), layers.Dense(1)])
    model.compile("sgd", "mse")
    nrs = keras_nrs.wrap(model, scheme="rpr", eps=0.1)
    logs = nrs.fit(x, x[:, :1], verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    with pytest.raises(ValueError, match=r"keras\.random"):
        keras_nrs.wrap(model, eps=0.1, scheme="rpr", clean_pass=True).fit(
            x, x[:, :1], verbose=0
        )


@pytest.mark.matrix
def test_an_ascent_has_its_pass_at_theta() -> None:
    """And is sharpness-aware minimization: without a divergence unless asked for."""
    x, y = image_data(16)

    def run(**options: Any) -> tuple[list[np.ndarray], dict[str, list[float]]]:
        keras.utils.set_random_seed(0)
        model = cnn()
        nrs = keras_nrs.wrap(model, eps=0.1, seed=0, **options)
        logs = nrs.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
        return numpy_values(model.variables), logs

    values, logs = run(scheme="rpr", perturbation="ascent")
    expected, sam_logs = run(scheme="sam")
    assert_equal(values, expected)
    assert logs == sam_logs


@pytest.mark.matrix
def test_saving(tmp_path: Any) -> None:
    x, y = image_data(16)
    nrs = keras_nrs.wrap(cnn(), eps=0.1, scheme="rpr")
    nrs.fit(x, y, verbose=0)
    nrs.save(tmp_path / "rpr.keras")
    loaded = keras.saving.load_model(tmp_path / "rpr.keras")
    assert loaded.clean_pass is False
    assert nrs.train_on_batch(x, y) == loaded.train_on_batch(x, y)


@pytest.mark.matrix
def test_rpr_of_an_older_file_has_its_clean_pass() -> None:
    config = keras_nrs.wrap(cnn(), scheme="rpr").get_config()
    del config["clean_pass"]
    assert keras_nrs.NRSModel.from_config(config).clean_pass
    config = keras_nrs.wrap(cnn()).get_config()
    del config["clean_pass"]
    assert not keras_nrs.NRSModel.from_config(config).clean_pass


@pytest.mark.matrix
@pytest.mark.only_jax
def test_a_compiled_step_multiplies_no_more_than_plain_keras() -> None:
    """Counted by XLA: one forward and one backward pass."""
    x, y = image_data(16)

    def products(**options: Any) -> int:
        model = cnn(batch_norm=False)
        trained = keras_nrs.wrap(model, **options) if options else model
        trained.train_on_batch(x, y)
        program = lowered_step(trained, x, y).as_text()
        return len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", program))

    assert products(scheme="rpr", perturbation="relative") == products() > 0
    assert products(scheme="rpr", clean_pass=True) > products()
