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

# Does something and gives the seconds that it took.
Run = Callable[[], float]


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


class _EpochTimer(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._start


def epoch(model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int) -> Run:
    """An epoch of training.

    From its begin to its end, when the loss is known, and not all of `fit()`: that
    waits for its threads afterwards, on TensorFlow for as long again at times.
    """
    timer = _EpochTimer()

    def run() -> float:
        model.fit(
            x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[timer]
        )
        return timer.seconds

    return run


def timed(function: Callable[[], Any]) -> Run:
    """A call of a function."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def interleaved(runs: Mapping[str, Run], num_runs: int = RUNS) -> dict[str, np.ndarray]:
    """The durations in seconds of each of the runs, which take turns."""
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_runs):
        for name, run in runs.items():
            durations[name].append(run())
    return {name: np.array(times) for name, times in durations.items()}


def ratio(times: np.ndarray, base_times: np.ndarray) -> str:
    """The median of the ratios of runs in the same turn, and their range."""
    ratios = times / base_times
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
