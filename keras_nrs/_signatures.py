"""Signatures that name what `**options` takes.

`help()`, notebooks and `inspect.signature()` read them; type checkers read the
`TypedDict` of the options.
"""

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def spell_out(function: Function, options: Iterable[inspect.Parameter]) -> Function:
    """Let the signature of a function name the options that it takes as `**options`."""
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    spelled = signature.replace(parameters=[*parameters, *options])
    function.__signature__ = spelled  # type: ignore[attr-defined]
    return function


def with_options_of(source: Callable[..., Any]) -> Callable[[Function], Function]:
    """A decorator for functions whose `**options` are keyword arguments of another."""
    parameters = inspect.signature(source).parameters.values()
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return lambda function: spell_out(function, options)
