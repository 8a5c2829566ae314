"""Times a step of NRS and of its peers against plain Keras in the same process.

    KERAS_BACKEND=jax python -m tests.benchmarks [MLP] [CNN] [ViT-Ti/4] [WRN-16-4]
        [BiLSTM] [Embedding] [--variants RPR SAM ...]

For each network: medians of runs that take turns and their range, over a plain step and
over one of a textbook SAM, the time until the first epoch is over, and memory. Then how
the cost grows. Nothing else may run on the machine. Without names, all networks take 15
to 30 minutes on 2 cores. With `--variants`, only these ways to train are timed, beside
plain Keras and textbook SAM, and no memory is measured.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import keras
import numpy as np

from tests.benchmarks import growth
from tests.benchmarks import memory
from tests.benchmarks import networks
from tests.benchmarks import peers
from tests.benchmarks import timing

BACKEND = keras.config.backend()


TEXTBOOK_SAM = "textbook SAM"


def print_times(name: str, variants: Sequence[str] | None = None) -> None:
    """A line for each way to train a network, or for some of `networks.VARIANTS`."""
    network = networks.NETWORKS[name]
    x, y = networks.data(network.make(), network.batch_size * network.steps)

    def epoch(model: keras.Model) -> timing.Run:
        return timing.epoch(model, x, y, network.batch_size)

    runs = {
        variant: epoch(networks.trained(network.make, variant))
        for variant in networks.VARIANTS
        if variants is None or variant in (networks.PLAIN, *variants)
    }
    runs[TEXTBOOK_SAM] = epoch(peers.SAM[BACKEND](networks.compiled(network.make)))
    if variants is None:
        runs["textbook Equation 3"] = epoch(
            peers.EQUATION_3[BACKEND](networks.compiled(network.make))
        )
    if variants is None and BACKEND == "jax":
        model = networks.compiled(network.make)
        sam = peers.optax_sam(model, x, y, network.batch_size)
        runs["optax.contrib.sam"] = timing.timed(sam)
    firsts = {variant: run() for variant, run in runs.items()}
    for run in runs.values():
        run()
    times = timing.interleaved(runs)
    print(f"\n{name}, {BACKEND}, batches of {network.batch_size}")
    print("| | ms / step | ratio (range) | over textbook SAM | first epoch, s |")
    print("|---|---|---|---|---|")
    for variant, seconds in times.items():
        print(
            f"| {variant} | {1000 * np.median(seconds) / network.steps:.1f} "
            f"| {timing.ratio(seconds, times[networks.PLAIN])} "
            f"| {timing.ratio(seconds, times[TEXTBOOK_SAM])} "
            f"| {firsts[variant]:.1f} |",
            flush=True,
        )


def print_memory(name: str, batch_size: int) -> None:
    """A line for each way to train a network: its memory, and the ratio to plain."""
    sizes = {}
    for variant in (networks.PLAIN, "NRS", "NRS, memory_efficient"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            size = process.submit(memory.bytes_of, name, batch_size, variant).result()
        sizes[variant] = size
        print(
            f"{name}, batch of {batch_size}, memory of {variant}: {size / 2**20:.0f} "
            f"MiB, {size / sizes[networks.PLAIN]:.2f}",
            flush=True,
        )


def main() -> None:
    timing.keep_freed_memory()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NETWORK")
    parser.add_argument("--variants", nargs="+", choices=list(networks.VARIANTS))
    parsed = parser.parse_args()
    names = parsed.names or list(networks.NETWORKS)
    if unknown := [name for name in names if name not in networks.NETWORKS]:
        parser.error(f"names must be of {list(networks.NETWORKS)}. Received: {unknown}")
    for name in names:
        print_times(name, parsed.variants)
        if parsed.variants is None:
            print_memory(name, 128)
    if len(names) == len(networks.NETWORKS) and parsed.variants is None:
        growth.main()


if __name__ == "__main__":
    main()
