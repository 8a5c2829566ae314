"""How the cost of a step grows, as ratios to plain Keras.

    KERAS_BACKEND=jax python -m tests.benchmarks.growth

With the number of weights, the batch size and `perturbations_per_replica`, and with
each perturbation; then the cost of the noise by itself, and of Python on a model that
is too small to matter. For the number of replicas see `several_devices.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.perturbations import NAMES
from keras_nrs.perturbations import RelativeBall
from tests.benchmarks import networks
from tests.benchmarks import timing


def print_ratios(
    name: str,
    make: Callable[[], keras.Model],
    batch_size: int,
    variants: dict[str, dict[str, Any]],
) -> None:
    x, y = networks.data(make(), 20 * batch_size)
    models = {"plain": networks.compiled(make)}
    for variant, kwargs in variants.items():
        arguments = {"eps": 0.3, "perturbation": RelativeBall()} | kwargs
        models[variant] = keras_nrs.wrap(networks.compiled(make), **arguments)
    runs = {n: timing.epoch(m, x, y, batch_size) for n, m in models.items()}
    for run in [*runs.values(), *runs.values()]:
        run()
    times = timing.interleaved(runs, 7)
    for variant in variants:
        ratio = timing.ratio(times[variant], times["plain"])
        step = 1000 * np.median(times["plain"]) / 20
        print(f"{name}{variant}: {ratio} x {step:.2f} ms", flush=True)


def print_noise(size: int = 2**22) -> None:
    """The time of the noise for 4 million weights, and of the backend's own."""
    dtype = keras.random.SeedGenerator(0).state.dtype
    key = keras.ops.convert_to_tensor([1, 2], dtype)
    draws = {
        "normal": lambda k: RandomStream(k).normal((size,)),
        "rademacher": lambda k: RandomStream(k).rademacher((size,)),
        "keras.random.normal": lambda _: keras.random.normal((size,), seed=0),
    }
    for name, draw in draws.items():
        compiled = compile_function(draw)

        def read(compiled: Callable[[Any], Any] = compiled) -> Any:
            return keras.ops.convert_to_numpy(compiled(key)[0])

        read()
        times = timing.interleaved({name: timing.timed(read)}, 11)[name]
        print(f"{size} elements, {name}: {1000 * np.median(times):.1f} ms", flush=True)


def print_perturbations() -> None:
    """Where weights, and where samples, are the cost of a step."""
    kinds = {f"perturbation={name!r}": {"perturbation": name} for name in NAMES}
    print_ratios("MLP, batch 32, ", networks.mlp, 32, kinds)
    print_ratios("CNN, batch 32, ", networks.cnn, 32, kinds)


def tiny() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(networks.NUM_CLASSES)])


def main() -> None:
    timing.keep_freed_memory()
    print(f"\nGrowth, {keras.config.backend()}")
    nrs: dict[str, dict[str, Any]] = {"": {}}
    for width in (256, 512, 1024, 2048):
        make = functools.partial(networks.mlp, width)
        print_ratios(f"MLP of width {width}, batch 32", make, 32, nrs)
    for batch_size in (8, 32, 128, 512):
        print_ratios(f"MLP, batch {batch_size}", networks.mlp, batch_size, nrs)
    for batch_size in (8, 32, 128):
        print_ratios(f"CNN, batch {batch_size}", networks.cnn, batch_size, nrs)
    groups = {
        f"perturbations_per_replica={k}": {"perturbations_per_replica": k}
        for k in (1, 2, 4, 8)
    }
    print_ratios("CNN, batch 32, ", networks.cnn, 32, groups)
    print_ratios("MLP, batch 32, ", networks.mlp, 32, groups)
    print_perturbations()
    print_ratios(
        "A layer of 40 weights, batch 32, ",
        tiny,
        32,
        {"baseline": {"scheme": "baseline"}, "NRS": {}},
    )
    print_noise()


if __name__ == "__main__":
    main()
