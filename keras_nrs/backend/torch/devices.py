"""Devices and processes on PyTorch: Keras trains on one device of each process.

The processes of a group of `torch.distributed` train one model: each is a replica.
"""

import os
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed

Tensor = Any


def join_processes() -> None:
    """Join the processes that `torchrun` started.

    Raises:
        ValueError: if it has not started this one.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "Several processes need to be started by torchrun, such as `torchrun "
            "--nproc-per-node 2 --no-python keras-nrs train ...`. Received: an "
            "environment without RANK and WORLD_SIZE."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def processes() -> tuple[int, int]:
    """The index of this process in its group, and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def process_index(model: Any) -> int:
    """The index of this process in a run of several."""
    return processes()[0]


def values_of_processes(values: list[float], model: Any = None) -> list[list[float]]:
    """These values in every process. All of them must call this."""
    _, number = processes()
    if number == 1:
        return [values]
    gathered: list[Any] = [None] * number
    distributed.all_gather_object(gathered, values)
    return gathered


def sums_over_processes(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The sum of each tensor over all processes, all of which must call this."""
    with torch.no_grad():
        sums = [None if t is None else t.contiguous().clone() for t in tensors]
        works = [
            distributed.all_reduce(total, async_op=True)
            for total in sums
            if total is not None
        ]
        for work in works:
            work.wait()
    return sums


def means_over_processes(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The mean of each tensor over all processes, all of which must call this."""
    _, number = processes()
    if number == 1:
        return list(tensors)
    return [s if s is None else s / number for s in sums_over_processes(tensors)]


def share_first_values(variables: Sequence[Any]) -> None:
    """Give variables the values that they have in the first process."""
    with torch.no_grad():
        for variable in variables:
            value = variable.value.contiguous()
            distributed.broadcast(value, 0)
            variable.assign(value)


@contextmanager
def metrics_of_all_processes(variables: Sequence[Any]) -> Iterator[None]:
    """A scope in which variables of metrics count the samples of all processes."""
    summed = [v for v in variables if v.aggregation == "sum"]
    own = [v.value.clone() for v in summed]
    try:
        for variable, total in zip(summed, sums_over_processes(own), strict=True):
            variable.assign(total)
        yield
    finally:
        for variable, value in zip(summed, own, strict=True):
            variable.assign(value)


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices that Keras uses: one."""
    return nullcontext()


def fit_scope() -> AbstractContextManager[None]:
    """A scope for `fit()` of a model that was built in `data_parallel_scope()`."""
    return nullcontext()


def scope_of(model: Any) -> AbstractContextManager[Any]:
    """A scope that places new variables on the device of a model: Keras does so."""
    return nullcontext()


def shares_of_workers(dataset: Any, batch_size: int) -> Any:
    """A data set of this process's share of each batch, as `fit()` takes it."""
    return dataset


def loop_over_batches() -> AbstractContextManager[None]:
    """A context for `fit()` and the like."""
    return nullcontext()
