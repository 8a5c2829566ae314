"""Times a step on two virtual devices against plain Keras `DataParallel` on the same.

    KERAS_BACKEND=jax python -m tests.benchmarks.several_devices

Prints, for three networks, the median of the ratios of interleaved runs in one process
and their range. Nothing else may run on the machine.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# One thread for each device: with a pool each they take the cores from one another.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false",
)

import keras
import numpy as np
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
        step = 1000 * np.median(times["plain"]) / STEPS
        for noise in NOISES:
            print(
                f"{make.__name__}, 2 devices, {noise} noise: "
                f"{timing.ratio(times[noise], times['plain'])} x {step:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
