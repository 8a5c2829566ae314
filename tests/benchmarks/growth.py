"""How the cost of a step grows, as ratios to plain Keras.

    KERAS_BACKEND=jax python -m tests.benchmarks.growth [--curves FOLDER]

With the number of weights, the batch size and, on JAX, the number of devices: time and
memory. Then with `perturbations_per_replica` and with each perturbation; then the cost
of the noise by itself, and of Python on a model that is too small to matter. With
`--curves`, the first part alone, which also writes `growth.csv` and `growth.png`: 10
minutes on 2 cores. Nothing else may run on the machine.
"""

import argparse
import csv
import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.perturbations import NAMES
from keras_nrs.perturbations import RelativeBall
from tests.benchmarks import memory
from tests.benchmarks import networks
from tests.benchmarks import timing

TURNS = 7
# Of a timed run of plain steps, if 2 to 60 of them take as long.
RUN_SECONDS = 0.5
WIDTHS = (300, 550, 980, 1750, 3150, 5570, 9980)
BATCH_SIZES = (1, 4, 16, 64, 256, 1024)
DEVICES = (1, 2, 4, 8)


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        axis: What grows along the curve.
        network: Name of the network.
        make: Makes the model.
        batch_size: Number of samples in a batch, of all devices together.
        num_devices: Number of virtual devices, each with a thread of its own; `None`
            for the backend's default.
    """

    axis: str
    network: str
    make: Callable[[], keras.Model]
    batch_size: int = 32
    num_devices: int | None = None


def points() -> list[Point]:
    """All points that the backend can have."""
    found = [
        Point("weights", "MLP", functools.partial(networks.mlp, w)) for w in WIDTHS
    ]
    for network, make in {"MLP": networks.mlp, "CNN": networks.cnn}.items():
        found += [Point("batch size", network, make, size) for size in BATCH_SIZES]
    if keras.config.backend() == "jax":
        small = {"MLP": functools.partial(networks.mlp, 512), "CNN": networks.cnn}
        for network, make in small.items():
            found += [Point("devices", network, make, 64, num) for num in DEVICES]
    return found


def measured(point: Point) -> dict[str, Any]:
    """A row of the table: medians, ranges, and MiB besides weights and data."""
    is_one = point.num_devices is None
    with nullcontext() if is_one else keras.distribution.DataParallel().scope():
        plain = networks.trained(point.make, networks.PLAIN)
        models = {"plain": plain, "NRS": networks.trained(point.make, "NRS")}
        row = {
            "backend": keras.config.backend(),
            "axis": point.axis,
            "network": point.network,
            "weights": plain.count_params(),
            "batch size": point.batch_size,
            "devices": point.num_devices or 1,
        }
        if keras.config.backend() != "tensorflow":  # It takes new processes there.
            for name, model in models.items():
                size = memory.step_bytes(model, point.batch_size)
                row[f"{name} MiB"] = round(size / 2**20, 3)
        times = _times(models, point.batch_size)
    ratios = times["NRS"] / times["plain"]
    return row | {
        "plain ms": round(1000 * float(np.median(times["plain"])), 4),
        "ratio": round(float(np.median(ratios)), 3),
        "lowest": round(float(ratios.min()), 3),
        "highest": round(float(ratios.max()), 3),
    }


def _times(models: dict[str, keras.Model], batch_size: int) -> dict[str, np.ndarray]:
    """The seconds of a step of each, in turns."""

    def runs(steps: int) -> dict[str, timing.Run]:
        x, y = networks.data(models["plain"], steps * batch_size)
        return {n: timing.epoch(m, x, y, batch_size) for n, m in models.items()}

    first = runs(2)
    for run in first.values():
        run()  # Compiles.
    steps = int(np.clip(RUN_SECONDS / (first["plain"]() / 2), 2, 60))
    timed = runs(steps)
    for run in timed.values():
        run()
    times = timing.interleaved(timed, TURNS)
    return {name: seconds / steps for name, seconds in times.items()}


def measured_in_new_process(point: Point) -> dict[str, Any]:
    """A row, measured where the number of devices can be chosen."""
    flags = os.environ.get("XLA_FLAGS")
    if point.num_devices is not None:
        os.environ["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={point.num_devices} "
            "--xla_cpu_multi_thread_eigen=false"
        )
    try:
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), timing.keep_freed_memory
        ) as process:
            return process.submit(measured, point).result()
    finally:
        if flags is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = flags


def print_curves(points: Iterable[Point]) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        row = measured_in_new_process(point)
        rows.append(row)
        sizes = ""
        if "NRS MiB" in row:
            ratio = row["NRS MiB"] / (row["plain MiB"] or math.nan)
            sizes = f", memory {ratio:.2f} x {row['plain MiB']:.1f} MiB"
        print(
            f"{point.network}, {row['weights']} weights, batch {point.batch_size}, "
            f"{row['devices']} devices: {row['ratio']:.2f} ({row['lowest']:.2f}-"
            f"{row['highest']:.2f}) x {row['plain ms']:.2f} ms{sizes}",
            flush=True,
        )
    return rows


def write_curves(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write `growth.csv` and `growth.png`."""
    with (folder / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "growth.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time on the left, memory on the right, with a row for each axis."""
    from matplotlib.figure import Figure

    from keras_nrs.flatness.palette import GRAY
    from keras_nrs.flatness.palette import styles

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    style_of = styles(row["network"] for row in rows)
    figure = Figure(figsize=(6, 2.4 * len(axes_names)), dpi=200, layout="constrained")
    grid = figure.subplots(len(axes_names), 2, sharey="col", squeeze=False)
    for (left, right), axis in zip(grid, axes_names, strict=True):
        for network, style in style_of.items():
            own = [r for r in rows if (r["axis"], r["network"]) == (axis, network)]
            if not own:
                continue
            x = [row[axis] for row in own]
            ratios = np.array([[r["ratio"], r["lowest"], r["highest"]] for r in own]).T
            median, low, high = ratios
            left.errorbar(
                x,
                median,
                [median - low, high - median],
                **style.line,
                marker=style.marker,
                capsize=2,
                label=network,
            )
            if "NRS MiB" in own[0]:
                sizes = [r["NRS MiB"] / (r["plain MiB"] or math.nan) for r in own]
                right.plot(x, sizes, **style.line, marker=style.marker, label=network)
        for axes in (left, right):
            axes.axhline(2, color=GRAY, linestyle=":")
            axes.set_xscale("log")
            axes.set_xlabel(axis)
            if axis != "weights":
                ticks = sorted({row[axis] for row in rows if row["axis"] == axis})
                axes.set_xticks(ticks, ticks)
                axes.minorticks_off()
            axes.legend()
        left.set_ylabel("time / plain step")
        right.set_ylabel("memory / plain step")
    figure.savefig(path)


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
    print_curves(points())
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
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("--curves", type=Path, metavar="FOLDER")
    folder = parser.parse_args().curves
    if folder is None:
        main()
    else:
        write_curves(print_curves(points()), folder)
