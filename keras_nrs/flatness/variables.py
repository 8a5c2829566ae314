"""The choice of the weights that a measurement is about."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

from keras_nrs.keras_internals import producer
from keras_nrs.keras_internals import producer_inputs
from keras_nrs.keras_internals import sublayers

Selection = str | Callable[[Any], bool]


def select(model: Any, variables: Selection) -> list[keras.Variable]:
    """The trainable variables that a selection names, in the model's order.

    Args:
        model: A built model, which must not be wrapped.
        variables: `"last_layer"`: the weights of the layer that makes an output, or of
            the last layer with weights before it, for each output. `"all"`. Or a
            predicate of a `keras.Variable`.

    Raises:
        TypeError, ValueError: if `variables` is not as described, or selects nothing.
    """
    trainable = model.trainable_variables
    if callable(variables) and not isinstance(variables, keras.Layer):
        chosen = [v for v in trainable if variables(v)]
    elif variables == "all":
        chosen = list(trainable)
    elif variables == "last_layer":
        ids = {id(v) for layer in last_layers(model) for v in layer.trainable_variables}
        chosen = [v for v in trainable if id(v) in ids]
    else:
        received = repr(variables) if isinstance(variables, str) else "a value"
        raise ValueError(
            "`variables` must be 'last_layer', 'all' or a function of a variable. "
            f"Received: {received} of type {type(variables).__name__}. For example: "
            "variables=lambda v: 'kernel' in v.path"
        )
    chosen = [v for v in chosen if keras.backend.is_float_dtype(v.dtype)]
    if not chosen:
        paths = [v.path for v in trainable]
        shown = paths if len(paths) < 10 else [*paths[:9], "..."]
        raise ValueError(
            "`variables` must select at least one trainable variable. Received: "
            f"variables={variables!r}, which selects none of {shown}."
        )
    return chosen


def last_layers(model: Any) -> list[keras.Layer]:
    """The last layers with trainable weights, one for each output.

    Keras does not know which layer makes the output of a subclassed model. There it is
    the layer that was made last.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if not outputs or None in map(producer, outputs):
        with_weights = [s for s in sublayers(model) if s.trainable_variables]
        if not with_weights:
            return [model] if model.trainable_variables else []
        return last_layers(with_weights[-1])
    layers = [layer for output in outputs for layer in _last_with_weights(output)]
    return list({id(layer): layer for layer in layers}.values())


def _last_with_weights(output: Any) -> Iterator[keras.Layer]:
    """The first layers with trainable weights on the paths back from an output."""
    operation = producer(output)
    if getattr(operation, "trainable_variables", None):
        if isinstance(operation, keras.Model):
            yield from last_layers(operation)
        else:
            yield operation
        return
    for tensor in producer_inputs(output):
        yield from _last_with_weights(tensor)
