"""How much memory a step takes, and how long it takes to compile."""

import contextlib
import ctypes
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tests.benchmarks import networks
from tests.benchmarks import timing


def bytes_of(name: str, batch_size: int, variant: str) -> int:
    """What a step of one of `networks.NETWORKS` needs besides weights and data."""
    return step_bytes(
        networks.trained(networks.NETWORKS[name].make, variant), batch_size
    )


def step_bytes(model: keras.Model, batch_size: int) -> int:
    """What a step needs besides weights and data, of each device.

    On JAX the compiler's own figure, on PyTorch the most that it had allocated. On
    TensorFlow by how much a step makes the process grow after one on a single sample,
    which is right in a new process only.
    """
    x, y = networks.data(model, batch_size)
    if keras.config.backend() == "jax":
        analysis = lowered_step(model, x, y).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)
    timing.epoch(model, x[:1], y[:1], 1)()
    step = timing.epoch(model, x, y, batch_size)
    if keras.config.backend() == "torch":
        return peak_allocated_bytes(step)
    return peak_resident_bytes(step)


def lowered_step(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Any:
    """The training step on JAX. `compile().memory_analysis()` tells its memory."""
    import jax

    step, state = step_and_state(model, x)
    if (distribution := keras.distribution.distribution()) is not None:
        mesh = distribution.device_mesh.backend_mesh
        split = jax.sharding.PartitionSpec(distribution.batch_dim_name)
        x, y = jax.device_put((x, y), jax.sharding.NamedSharding(mesh, split))
    # As Keras compiles it: the state is given away and comes back new.
    return jax.jit(step, donate_argnums=0).lower(state, (x, y, None))


def step_and_state(
    model: keras.Model, x: np.ndarray
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The training step on JAX, which takes the state and `(x, y, None)`, and it."""
    if not model.built:
        model.build(x.shape)
    model.optimizer.build(model.trainable_variables)
    of_model = (model.trainable_variables, model.non_trainable_variables)
    others = (model.optimizer.variables, model.metrics_variables)
    state = tuple([v.value for v in kind] for kind in (*of_model, *others))
    return model.train_step, state


@contextlib.contextmanager
def of_programs() -> Iterator[dict[str, int]]:
    """Gives, at its end, the memory of the largest program that runs inside.

    As `"temporary_bytes"`, besides weights and data. On JAX of the programs that are
    compiled inside, as the compiler says; on PyTorch on a GPU the most that was
    allocated; otherwise nothing.
    """
    found: dict[str, int] = {}
    if keras.config.backend() == "jax":
        import jax

        client = jax.devices()[0].client
        known = set(client.live_executables())
        yield found
        sizes = [
            program.get_compiled_memory_stats().temp_size_in_bytes
            for program in client.live_executables()
            if program not in known
        ]
        if sizes:
            found["temporary_bytes"] = max(sizes)
        return
    import torch

    if not torch.cuda.is_available():
        yield found
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found["temporary_bytes"] = torch.cuda.max_memory_allocated() - before


def peak_allocated_bytes(run: Callable[[], Any]) -> int:
    """The most that PyTorch has allocated more than before while it runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in changes]).max())


def peak_resident_bytes(run: Callable[[], Any]) -> int:
    """By how much the memory of the process grows at the most while it runs (Linux)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}.")
