"""The device of PyTorch: Keras trains on one device of one process."""

from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any


def data_parallel_scope() -> AbstractContextManager[None]:
    """A scope for building and training on all devices that Keras uses: one."""
    return nullcontext()


def scope_of(model: Any) -> AbstractContextManager[Any]:
    """A scope that places new variables on the device of a model: Keras does so."""
    return nullcontext()


def process_index(model: Any) -> int:
    """The index of this process: there is one."""
    return 0


def values_of_processes(values: list[int]) -> list[list[int]]:
    """These values in every process."""
    return [values]


def loop_over_batches() -> AbstractContextManager[None]:
    """A context for `fit()` and the like."""
    return nullcontext()
