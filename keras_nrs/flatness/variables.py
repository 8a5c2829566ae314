"""The choice of the weights that a measurement is about."""

import difflib
import re
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import keras

from keras_nrs.batches import Batches
from keras_nrs.flatness.last_layer import last_layer
from keras_nrs.keras_internals import sublayers

# `str` is "last_layer", "all", or the name or path of a layer or variable.
Item: TypeAlias = "str | re.Pattern[str] | keras.Variable | keras.Layer"
Selection: TypeAlias = "Item | Callable[[Any], bool] | Sequence[Item]"

_ALLOWED = (
    "'last_layer', 'all', the name of a layer, a compiled regular expression of "
    "variables' paths, a layer, a variable, a list of these, or a function of a "
    "variable"
)


def select(model: Any, variables: Selection, batches: Batches) -> list[keras.Variable]:
    """The trainable variables that a selection names, in the model's order.

    Args:
        model: A built model, which must not be wrapped.
        variables: One of these, or a list of them, of which each counts:

            - `"last_layer"`: the weights of the layer that makes an output, or of the
              last layer with weights before it, for each output. Where a model itself
              multiplies by a kernel after that, this kernel, and the biases and scales
              after it.
            - `"all"`.
            - The name or the path of a layer, anywhere in the model, or the path of a
              variable.
            - A compiled regular expression, `re.compile(...)`, that is found somewhere
              in the path of a variable.
            - A layer or a variable of the model.

            Or a predicate of a `keras.Variable`.
        batches: The data. A subclassed model is called with the first batch, to find
            its last layer.

    Raises:
        TypeError, ValueError: if `variables` is not as described, or an item of it
            selects nothing.
    """
    trainable = model.trainable_variables
    chosen: list[keras.Variable]
    if isinstance(variables, list | tuple):
        chosen = [v for item in variables for v in _of_item(model, item, batches)]
    elif callable(variables) and not isinstance(variables, keras.Layer):
        chosen = [v for v in trainable if variables(v)]
    else:
        chosen = _of_item(model, variables, batches)
    ids = {id(v) for v in chosen}
    chosen = [
        v for v in trainable if id(v) in ids and keras.backend.is_float_dtype(v.dtype)
    ]
    if not chosen:
        raise ValueError(
            "`variables` must select at least one trainable variable. Received: "
            f"variables={variables!r}, which selects none of {_shown(_paths(model))}. "
            "Pass 'all' or a predicate, for example: "
            "variables=lambda v: 'kernel' in v.path"
        )
    return chosen


def _of_item(model: Any, item: Any, batches: Batches) -> list[keras.Variable]:
    """The trainable variables of an item of a selection, at least one."""
    trainable: list[keras.Variable] = model.trainable_variables
    if isinstance(item, str):
        if item == "all":
            return trainable
        if item == "last_layer":
            return last_layer(model, batches)
        return _named(model, item)
    if isinstance(item, re.Pattern):
        found = [v for v in trainable if item.search(v.path)]
        if not found:
            raise ValueError(
                "A regular expression in `variables` must be found in the path of a "
                f"trainable variable. Received: {item!r}, which is in none of "
                f"{_shown(_paths(model))}."
            )
        return found
    if isinstance(item, keras.Layer):
        return _of_layer(model, item)
    if isinstance(item, keras.Variable):
        if not any(item is v for v in trainable):
            raise ValueError(
                "A variable in `variables` must be a trainable one of the model. "
                f"Received: {item.path!r}, which is none of {_shown(_paths(model))}."
            )
        return [item]
    raise TypeError(
        f"`variables` must be {_ALLOWED}. Received: {item!r} of type "
        f"{type(item).__name__}. For example: variables=lambda v: 'kernel' in v.path"
    )


def _of_layer(model: Any, layer: keras.Layer) -> list[keras.Variable]:
    """The trainable variables of a layer of the model."""
    if not any(layer is known for known in (model, *_layers(model))):
        raise ValueError(
            "A layer in `variables` must be one of the model. Received: a layer named "
            f"{layer.name!r} that is not in the model named {model.name!r}, whose "
            f"layers with weights are {_shown(_names(model))}."
        )
    found: list[keras.Variable] = layer.trainable_variables
    if not found:
        raise ValueError(
            "A layer in `variables` must have trainable weights. Received: "
            f"{layer.name!r}, which has none, or is frozen (trainable=False). Layers "
            f"with some are {_shown(_names(model))}."
        )
    return found


def _named(model: Any, name: str) -> list[keras.Variable]:
    """The trainable variables of the layers, or the variable, of a name."""
    layers = [sub for sub in _layers(model) if name in (sub.name, sub.path)]
    if layers:
        return [v for layer in layers for v in _of_layer(model, layer)]
    found = [v for v in model.trainable_variables if v.path == name]
    if not found:
        known = [*_names(model), *_paths(model)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Near it are {near}" if near else f"There are {_shown(_names(model))}"
        raise ValueError(
            f"`variables` must be {_ALLOWED}. Received: {name!r}, which no layer and "
            f"no variable of the model named {model.name!r} is called. {hint}. For a "
            f"part of a name: variables=re.compile({name!r})"
        )
    return found


def _layers(model: Any) -> list[keras.Layer]:
    return sublayers(model, recursive=True)


def _names(model: Any) -> list[str]:
    """The names of the layers with trainable weights, in the order of these."""
    place = {id(v): i for i, v in enumerate(model.trainable_variables)}
    layers = [layer for layer in _layers(model) if layer.trainable_variables]
    layers.sort(key=lambda layer: place[id(layer.trainable_variables[0])])
    return [layer.name for layer in layers]


def _paths(model: Any) -> list[str]:
    return [v.path for v in model.trainable_variables]


def _shown(names: list[str]) -> list[str]:
    return names if len(names) < 10 else [*names[:9], "..."]
