"""The random generators of Python and NumPy, from which layers may draw.

`AugMix` does, for example: at each step on PyTorch, and elsewhere when a step is
compiled.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_nrs.backend import not_in_graphs


class HostRandomState(NamedTuple):
    """States of both generators."""

    python: Any
    numpy: Any


@not_in_graphs
def host_random_state() -> HostRandomState:
    """The states of now."""
    return HostRandomState(random.getstate(), np.random.get_state())  # noqa: NPY002


@not_in_graphs
def _set_host_random_state(state: HostRandomState) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)  # noqa: NPY002


@contextmanager
def drawing_from(state: HostRandomState) -> Iterator[None]:
    """A context that begins with this state and ends with the one before it."""
    before = host_random_state()
    _set_host_random_state(state)
    try:
        yield
    finally:
        _set_host_random_state(before)
