"""Signatures that name what `**options` takes."""

import inspect
from typing import Any

import pytest

from keras_nrs import flatness
from keras_nrs._signatures import with_options_of

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

MEASUREMENTS = ("operator", "eigenvalues", "trace", "density")


def test_the_options_of_another_function_are_named() -> None:
    def source(x: int, *, a: int = 1, b: str = "c") -> None: ...

    @with_options_of(source)
    def function(y: int, *, d: float = 0.0, **options: Any) -> None: ...

    signature = str(inspect.signature(function))
    expected = "(y: int, *, d: float = 0.0, a: int = 1, b: str = 'c') -> None"
    assert signature == expected


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_name_the_options_of_the_operator(name: str) -> None:
    parameters = inspect.signature(getattr(flatness, f"hessian_{name}")).parameters
    kinds = [p.kind for p in parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert parameters["variables"].default == "last_layer"
    assert parameters["batch_size"].default == 32
    assert "checkpoint" in parameters
