"""Times runs of several models by turns in one process."""

import ctypes
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

RUNS = 5


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system.

    By default it does, above 32 MiB, and getting it again page by page may take longer
    than the step. Whether a buffer is above the limit would decide the comparison.
    """
    if sys.platform == "linux":
        arena_max, mmap_max, trim_threshold = -8, -4, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # Never.


def epoch(
    model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int
) -> Callable[[], None]:
    """A function that trains for one epoch."""

    def run() -> None:
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)

    return run


def seconds(run: Callable[[], Any]) -> float:
    """How long it runs."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Callable[[], Any]], num_runs: int = RUNS
) -> dict[str, np.ndarray]:
    """The durations in seconds of each of the runs, which take turns."""
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_runs):
        for name, run in runs.items():
            durations[name].append(seconds(run))
    return {name: np.array(times) for name, times in durations.items()}


def ratio(times: np.ndarray, base_times: np.ndarray) -> str:
    """The median of the ratios of runs in the same turn, and their range."""
    ratios = times / base_times
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
