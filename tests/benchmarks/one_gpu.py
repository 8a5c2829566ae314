"""Times a step of each method against plain Keras on one GPU, with a time limit.

    KERAS_BACKEND=jax python -m tests.benchmarks.one_gpu NETWORK FILE GO LIMIT

Programs of all methods are compiled first, the most interesting ones at first, until
the file GO is there. Several networks and backends may do so at once. Then they take
turns, and add a line of JSON to FILE for each method. LIMIT is the time, in seconds
since 1970, at which they end whatever is left.
"""

import fcntl
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

import keras_nrs
from keras_nrs import models
from tests.benchmarks import networks
from tests.benchmarks import peers
from tests.benchmarks import timing

BACKEND = keras.config.backend()
TEXTBOOK_SAM = "textbook SAM"
# Arguments of `wrap()`, in order of interest. Two methods are not wrapped.
METHODS: dict[str, dict[str, Any]] = {
    networks.PLAIN: {},
    "NRS": {},
    "SAM": {"scheme": "sam", "eps": 0.05},
    "RPR": {"scheme": "rpr"},
    TEXTBOOK_SAM: {},
    "NRS, perturbed_fraction=0.5": {"perturbed_fraction": 0.5},
    "NRS, interval=2": {"interval": 2},
}
NUM_RUNS = 4


class Network(NamedTuple):
    """A network, and how it is timed.

    Attributes:
        make: Makes the model.
        steps: Number of steps in a timed run on JAX; PyTorch takes a fourth of them.
        batch_size: Number of samples in a batch.
        policy: Dtype policy of the layers.
    """

    make: Callable[[], keras.Model]
    steps: int
    batch_size: int = 128
    policy: str = "mixed_bfloat16"


NETWORKS = {
    "MLP": Network(networks.mlp, 200, policy="float32"),
    "ResNet18": Network(models.resnet18, 40),
    "ViT-Ti/4": Network(lambda: models.vit(size="ti"), 40),
    "WRN-28-10": Network(models.wide_resnet, 12),
    # For a CPU.
    "smoke": Network(lambda: networks.mlp(16), 8, batch_size=8, policy="float32"),
}


def model_of(make: Callable[[], keras.Model], method: str) -> keras.Model:
    """The compiled network, ready to be trained by a method."""
    model = networks.compiled(make)
    if method == networks.PLAIN:
        return model
    if method == TEXTBOOK_SAM:
        return peers.SAM[BACKEND](model)
    return keras_nrs.wrap(model, **METHODS[method])


def compiled_runs(
    network: Network, steps: int, go: Path
) -> tuple[dict[str, timing.Run], dict[str, float]]:
    """A run for each method whose program was compiled in time, and its first time."""
    runs: dict[str, timing.Run] = {}
    firsts: dict[str, float] = {}
    x, y = networks.data(network.make(), network.batch_size * steps)
    for method in METHODS:
        if len(runs) > 1 and go.exists():
            break
        try:
            model = model_of(network.make, method)
            run = timing.epoch(model, x, y, network.batch_size)
            firsts[method] = run()
            run()
        except Exception:  # Such as of a method that needs too much memory.
            print(f"failed: {method}\n{traceback.format_exc()}", flush=True)
        else:
            runs[method] = run
            print(f"compiled: {method}, {firsts[method]:.1f} s", flush=True)
    return runs, firsts


def main(name: str, file: Path, go: Path, limit: float) -> None:
    network = NETWORKS[name]
    steps = network.steps if BACKEND == "jax" else max(network.steps // 4, 2)
    keras.config.set_dtype_policy(network.policy)
    runs, firsts = compiled_runs(network, steps, go)
    while not go.exists() and time.time() < limit:
        time.sleep(0.2)
    plain = runs.pop(networks.PLAIN)
    for method, run in runs.items():
        with file.open("a", encoding="utf-8") as lines:
            # One process at a time has the GPU, and each method a line of its own.
            fcntl.flock(lines, fcntl.LOCK_EX)
            if time.time() > limit:
                return
            times = timing.interleaved(
                {networks.PLAIN: plain, method: run}, num_runs=NUM_RUNS
            )
            line = {
                "network": name,
                "backend": BACKEND,
                "method": method,
                "plain_ms": _milliseconds(times[networks.PLAIN], steps),
                "ms": _milliseconds(times[method], steps),
                "ratio": timing.ratio(times[method], times[networks.PLAIN]),
                "first_seconds": round(firsts[method], 1),
            }
            print(json.dumps(line), file=lines, flush=True)


def _milliseconds(seconds: np.ndarray, steps: int) -> float:
    return round(1000 * float(np.median(seconds)) / steps, 3)


if __name__ == "__main__":
    _, name, file, go, limit = sys.argv
    main(name, Path(file), Path(go), float(limit))
