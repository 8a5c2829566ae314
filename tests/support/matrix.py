"""Parameters of which the gate tests a few where programs are compiled."""

from typing import Any

import pytest

PARAM = type(pytest.param())


def rest(*values: Any) -> list[Any]:
    """The rest of a matrix: in the gate on PyTorch, elsewhere a slow test."""
    params = [
        value if isinstance(value, PARAM) else pytest.param(value) for value in values
    ]
    return [p._replace(marks=[*p.marks, pytest.mark.matrix]) for p in params]
