"""Times a step of each method against plain Keras on one GPU, with a time limit.

    KERAS_BACKEND=jax python -m tests.benchmarks.one_gpu NETWORK FILE GO LIMIT

Programs of all methods are compiled first, the most interesting ones at first, until
the file GO is there. Several networks and backends may do so at once. Then they take
turns, and add a line of JSON to FILE for each method: times of a step, what the GPU ran
in it, and its memory besides weights and data. LIMIT is the time, in seconds since
1970, at which they end whatever is left.
"""

import collections
import fcntl
import json
import sys
import tempfile
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
from tests.benchmarks import memory
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
    "NRS, memory_efficient": {"memory_efficient": True},
    "NRS, interval=2": {"interval": 2},
}
NUM_RUNS = 4
# Methods of which it is recorded what the GPU runs.
PROFILED = (networks.PLAIN, "NRS", "SAM")
# Kernels that are named, those that take longest.
NUM_KERNELS = 6


class Network(NamedTuple):
    """A network, and how it is timed.

    Attributes:
        make: Makes the model.
        steps: Number of steps in a timed run on JAX; PyTorch takes a sixth of them.
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


Line = dict[str, Any]


def compiled_runs(
    network: Network, steps: int, go: Path
) -> tuple[dict[str, timing.Run], dict[str, Line]]:
    """A run for each method whose program was compiled in time.

    Returns:
        The runs, and for each one the seconds that its first epoch took, in which the
        step is compiled, and the memory of the step besides weights and data.
    """
    runs: dict[str, timing.Run] = {}
    firsts: dict[str, Line] = {}
    x, y = networks.data(network.make(), network.batch_size * steps)
    for method in METHODS:
        if len(runs) > 1 and go.exists():
            break
        try:
            model = model_of(network.make, method)
            run = timing.epoch(model, x, y, network.batch_size)
            with memory.of_programs() as measured:
                seconds = run()
            run()
            firsts[method] = {"first_seconds": round(seconds, 1)} | measured
        except Exception:  # Such as of a method that needs too much memory.
            print(f"failed: {method}\n{traceback.format_exc()}", flush=True)
        else:
            runs[method] = run
            print(f"compiled: {method}, {seconds:.1f} s", flush=True)
    return runs, firsts


def main(name: str, file: Path, go: Path, limit: float) -> None:
    network = NETWORKS[name]
    steps = network.steps if BACKEND == "jax" else max(network.steps // 6, 2)
    keras.config.set_dtype_policy(network.policy)
    runs, firsts = compiled_runs(network, steps, go)
    print("ready", flush=True)
    while not go.exists() and time.time() < limit:
        time.sleep(0.2)
    plain = runs[networks.PLAIN]
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
            } | firsts[method]
            if method in PROFILED:
                line |= device_profile(run, steps)
            print(json.dumps(line), file=lines, flush=True)


def device_profile(run: timing.Run, steps: int) -> Line:
    """What the GPU runs in a step: number, time and names of kernels, if any."""
    milliseconds: collections.Counter[str] = collections.Counter()
    num_kernels = 0
    for name, nanoseconds in DEVICE_EVENTS[BACKEND](run):
        num_kernels += 1
        milliseconds[name[:60]] += nanoseconds / 1e6 / steps
    if not num_kernels:
        return {}
    return {
        "kernels": round(num_kernels / steps, 1),
        "gpu_ms": round(sum(milliseconds.values()), 3),
        "longest": {k: round(v, 4) for k, v in milliseconds.most_common(NUM_KERNELS)},
    }


def _jax_events(run: timing.Run) -> list[tuple[str, float]]:
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [file] = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    return [
        (event.name, event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def _torch_events(run: timing.Run) -> list[tuple[str, float]]:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile

    if not torch.cuda.is_available():
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [
        (event.name(), event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]


DEVICE_EVENTS = {"jax": _jax_events, "torch": _torch_events}


def _milliseconds(seconds: np.ndarray, steps: int) -> float:
    return round(1000 * float(np.median(seconds)) / steps, 3)


if __name__ == "__main__":
    _, name, file, go, limit = sys.argv
    main(name, Path(file), Path(go), float(limit))
