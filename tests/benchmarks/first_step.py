"""Times the first step, in which Keras traces and compiles, over plain Keras's.

    KERAS_BACKEND=jax python -m tests.benchmarks.first_step [MLP] [CNN] ...
        [--variants NRS RPR ...]

Each measurement is a `fit()` of one batch in a new process. The processor's time, that
of all threads, is less disturbed by other processes than the time on the clock. On JAX,
a second line has steps that find their programs in JAX's compilation cache.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import keras
import numpy as np

from tests.benchmarks import networks
from tests.benchmarks import timing

RUNS = 3


class _EndOfEpoch(keras.callbacks.Callback):
    """Notes when the loss of the epoch is known, before `fit()` ends its threads."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.clocks = _clocks()


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def first_step(name: str, variant: str, cache: str | None = None) -> np.ndarray:
    """Seconds of the first `fit()` in this process, and those of its processor.

    Args:
        name: One of `networks.NETWORKS`.
        variant: One of `networks.VARIANTS`.
        cache: A folder for programs that JAX has compiled.
    """
    if cache is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    network = networks.NETWORKS[name]
    model = networks.trained(network.make, variant)
    x, y = networks.data(model, network.batch_size)
    end = _EndOfEpoch()
    start = _clocks()
    model.fit(x, y, batch_size=network.batch_size, verbose=0, callbacks=[end])
    return end.clocks - start


def in_new_process(*args: Any) -> np.ndarray:
    """`first_step()` in a process that has traced and compiled nothing yet."""
    # Forked from one that has imported all, which takes longer than most steps.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([networks.__name__])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(first_step, *args).result()


def print_first_steps(
    name: str, variants: Sequence[str], cache: str | None = None
) -> None:
    """A line for each way to train a network, beside plain Keras."""
    rows = [networks.PLAIN, *variants]
    if cache is not None:
        for row in rows:  # Fill the cache.
            in_new_process(name, row, cache)
    runs = [[in_new_process(name, row, cache) for row in rows] for _ in range(RUNS)]
    for i, row in enumerate(rows):
        seconds, plain = (np.transpose([run[j] for run in runs]) for j in (i, 0))
        cells = [
            f"{np.median(s):.2f} | {timing.ratio(s, p)}"
            for s, p in zip(seconds, plain, strict=True)
        ]
        cached = "" if cache is None else ", warm cache"
        print(
            f"| {name}, {keras.config.backend()}{cached} | {row} | "
            f"{' | '.join(cells)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.first_step")
    parser.add_argument("names", nargs="*", metavar="NETWORK")
    parser.add_argument(
        "--variants", nargs="+", choices=list(networks.VARIANTS), default=["NRS"]
    )
    parsed = parser.parse_args()
    print("| | | seconds | ratio (range) | of the processor | ratio (range) |")
    print("|---|---|---|---|---|---|")
    for name in parsed.names or networks.NETWORKS:
        print_first_steps(name, parsed.variants)
        if keras.config.backend() == "jax":
            with tempfile.TemporaryDirectory() as cache:
                print_first_steps(name, parsed.variants, cache)


if __name__ == "__main__":
    main()
