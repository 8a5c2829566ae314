"""Times a step on two virtual devices against plain Keras `DataParallel` on the same.

    KERAS_BACKEND=jax python -m tests.benchmarks.several_devices

Prints, for three networks, the median of the ratios of interleaved runs in one process
and their range; and the cost of `perturbations_per_replica` on one device. Nothing else
may run on the machine.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# One thread for each device: with a pool each they take the cores from one another.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false",
)

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_nrs
from keras_nrs.perturbations import RelativeBall

RUNS, STEPS, BATCH = 7, 8, 64


def mlp() -> keras.Model:
    dense = [layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((256,)), *dense, layers.Dense(10)])


def cnn() -> keras.Model:
    stack: list[Any] = [keras.Input((32, 32, 3))]
    for filters in (16, 32, 64):
        stack += [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
        ]
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(10)])


def transformer() -> keras.Model:
    inputs = keras.Input((64, 48))
    x = layers.Dense(96)(inputs)
    for _ in range(3):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(3, 32)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(96)(layers.Dense(384, activation="gelu")(y))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def epoch(make: Callable[[], keras.Model], **kwargs: Any) -> Callable[[], float]:
    """A function that times one epoch of a model, which is wrapped with `kwargs`."""
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, len(x))
    trained = keras_nrs.wrap(model, **kwargs) if kwargs else model

    def run() -> float:
        start = time.perf_counter()
        trained.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        return time.perf_counter() - start

    run()
    return run


def ratio(run: Callable[[], float], plain: Callable[[], float]) -> str:
    ratios = []
    for _ in range(RUNS):
        base = plain()
        ratios.append(run() / base)
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    nrs = {"eps": 0.3, "perturbation": "relative"}
    for make in (mlp, cnn, transformer):
        with keras.distribution.DataParallel().scope():
            plain = epoch(make)
            for noise in keras_nrs.perturbations.NOISES:
                run = epoch(make, eps=0.3, perturbation=RelativeBall(noise=noise))
                print(
                    f"{make.__name__}, 2 devices, {noise} noise: {ratio(run, plain)}",
                    flush=True,
                )
        plain = epoch(make)
        for groups in (1, 2, 4):
            run = epoch(make, perturbations_per_replica=groups, **nrs)
            print(
                f"{make.__name__}, 1 device, {groups} perturbations: "
                f"{ratio(run, plain)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
