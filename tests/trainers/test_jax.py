"""What only JAX's trainer does."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.benchmarks.memory import lowered_step
from tests.support.arrays import ROUNDING
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.replicas import assert_close
from tests.support.replicas import assert_step_is
from tests.support.replicas import by_hand
from tests.support.replicas import devices
from tests.support.replicas import on_devices
from tests.support.replicas import wrap


@pytest.mark.only_jax  # Elsewhere tensors can be read at any time.
def test_a_loss_that_reads_what_a_pass_kept() -> None:
    class Keeps(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, inputs: Any) -> Any:
            self.kept = self.dense(keras.ops.reshape(inputs, (-1, 36)))
            return self.kept

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + keras.ops.mean(self.kept)

    x, y = image_data(16)
    model = Keeps()
    compile_classifier(model)
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    with pytest.raises(ValueError, match="must not read a tensor after the pass"):
        nrs.fit(x, y, verbose=0)


@pytest.mark.only_jax  # Where a compiler tells how much memory a step takes.
def test_memory_efficient_steps_take_less_memory() -> None:
    """Of a deep network, whose activations are most of what a step needs."""
    x, y = np.zeros((4096, 16), "float32"), np.zeros(4096)

    def temporary_bytes(**kwargs: Any) -> int:
        hidden = [layers.Dense(64, activation="tanh") for _ in range(12)]
        model = keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(3)])
        compile_classifier(model, metrics=None)
        trained = keras_nrs.wrap(model, **kwargs) if kwargs else model
        analysis = lowered_step(trained, x, y).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    plain = temporary_bytes()
    assert temporary_bytes(eps=0.1) > 1.7 * plain
    assert temporary_bytes(eps=0.1, memory_efficient=True) < 1.25 * plain


@pytest.mark.only_jax
@pytest.mark.parametrize("size", [6, *rest(7, 3)])
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
@pytest.mark.parametrize("memory_efficient", [False, *rest(True)])
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
@pytest.mark.parametrize(
    "perturbation", ["filterwise", *rest("relative", "elementwise")]
)
def test_layouts_stay_and_no_device_gathers_the_weights(
    rng: np.random.Generator, perturbation: str
) -> None:
    import re

    import jax

    from keras_nrs.trainers.jax import PerturbedStep

    x = rng.normal(size=(16, 16)).astype("float32")
    y = rng.integers(0, 3, 16)
    distribution, model = sharded()
    with distribution.scope():
        model.compile(keras.optimizers.Adam(), model.loss)
        nrs = wrap(model, perturbation=perturbation)
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
