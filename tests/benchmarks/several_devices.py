"""Times a step on two virtual devices against plain Keras `DataParallel` on the same.

    KERAS_BACKEND=jax python -m tests.benchmarks.several_devices

Prints, for three networks, the median of the ratios of interleaved runs in one process
and their range, and the same for a plain step in two ways: each device on its own
(`jax.shard_map`, which a perturbation per replica needs) against one program for both
(as in plain Keras). Nothing else may run on the machine.
"""

import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
# One thread for each device: with a pool each they take the cores from one another.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false",
)

import jax
import keras
import numpy as np
from jax.sharding import PartitionSpec as P
from keras import layers

import keras_nrs
from keras_nrs.perturbations import NOISES
from keras_nrs.perturbations import RelativeBall
from tests.benchmarks import networks
from tests.benchmarks import timing

STEPS, BATCH = 16, 64


def mlp() -> keras.Model:
    """Two hidden layers: 400,000 weights."""
    dense = [layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((256,)), *dense, layers.Dense(10)])


def transformer() -> keras.Model:
    """Three blocks on sequences of 64: 340,000 weights."""
    inputs = keras.Input((64, 48))
    x = layers.Dense(96)(inputs)
    for _ in range(3):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(3, 32)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(96)(layers.Dense(384, activation="gelu")(y))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def plain_steps(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Runs of plain steps with the gradient in one program, and on each device."""
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    split, everywhere = P("batch"), P()
    batch = jax.device_put((x, y), jax.sharding.NamedSharding(mesh, split))

    def gradient(weights: Any, batch: Any) -> Any:
        def loss(weights: Any) -> Any:
            x, y = batch
            state = [v.value for v in model.non_trainable_variables]
            outputs, _ = model.stateless_call(weights, state, x, training=True)
            return model.loss(y, outputs)

        return jax.grad(loss)(weights)

    def mean_of_devices(weights: Any, batch: Any) -> Any:
        return jax.lax.pmean(gradient(weights, batch), "batch")

    on_each_device = jax.shard_map(
        mean_of_devices,
        mesh=mesh,
        in_specs=(everywhere, split),
        out_specs=everywhere,
        check_vma=False,
    )

    def run(function: Any) -> timing.Run:
        weights = [v.value for v in model.trainable_variables]

        @jax.jit
        def step(weights: Any, batch: Any) -> Any:
            gradient = function(weights, batch)
            return [w - 0.01 * g for w, g in zip(weights, gradient, strict=True)]

        def steps() -> None:
            for _ in range(STEPS):
                result = step(weights, batch)
            jax.block_until_ready(result)

        return timing.timed(steps)

    return {"one program": run(gradient), "each device": run(on_each_device)}


def main() -> None:
    timing.keep_freed_memory()
    for make in (mlp, networks.cnn, transformer):
        with keras.distribution.DataParallel().scope():
            models = {"plain": networks.compiled(make)}
            for noise in NOISES:
                models[noise] = keras_nrs.wrap(
                    networks.compiled(make), 0.3, perturbation=RelativeBall(noise=noise)
                )
            x, y = networks.data(models["plain"], STEPS * BATCH)
            runs = {n: timing.epoch(m, x, y, BATCH) for n, m in models.items()}
            for run in [*runs.values(), *runs.values()]:
                run()
            times = timing.interleaved(runs, 9)
            passes = plain_steps(networks.compiled(make), x[:BATCH], y[:BATCH])
            for run in [*passes.values(), *passes.values()]:
                run()
            times_of_passes = timing.interleaved(passes, 9)
        step = 1000 * np.median(times["plain"]) / STEPS
        for noise in NOISES:
            print(
                f"{make.__name__}, 2 devices, {noise} noise: "
                f"{timing.ratio(times[noise], times['plain'])} x {step:.1f} ms",
                flush=True,
            )
        ratio = timing.ratio(
            times_of_passes["each device"], times_of_passes["one program"]
        )
        print(f"{make.__name__}, plain step, each device / one program: {ratio}")


if __name__ == "__main__":
    main()
