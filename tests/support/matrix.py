"""Parameters of which the gate tests a few where programs are compiled."""

from typing import Any

import pytest


def rest(*values: Any) -> list[Any]:
    """The rest of a matrix: in the gate on PyTorch, elsewhere a slow test."""
    return [pytest.param(value, marks=pytest.mark.matrix) for value in values]
