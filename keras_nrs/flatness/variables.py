"""Which of a model's weights a measurement is about."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

Selection = str | Callable[[Any], bool]


def select(model: Any, variables: Selection) -> list[keras.Variable]:
    """The trainable variables that a selection names, in the model's order.

    Args:
        model: A built model, which must not be wrapped.
        variables: `"last_layer"`: those of the layer that makes the output, or of the
            last ones with weights before it, one for each output. `"all"`. Or a
            function of a `keras.Variable`.

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

    Of a subclassed model it is the one that was made last: Keras does not know which
    layer makes the output.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    histories = [getattr(output, "_keras_history", None) for output in outputs]
    if not outputs or not all(histories):
        own = [layer for layer in model._layers if layer.trainable_variables]
        if not own:
            return [model] if model.trainable_variables else []
        return last_layers(own[-1])
    found = {
        id(layer): layer for output in outputs for layer in _with_weights_before(output)
    }
    return list(found.values())


def _with_weights_before(output: Any) -> Iterator[keras.Layer]:
    """The first layers with trainable weights on the ways back from an output."""
    operation, node_index, _ = output._keras_history
    if getattr(operation, "trainable_variables", None):
        if isinstance(operation, keras.Model):
            yield from last_layers(operation)
        else:
            yield operation
        return
    for parent in operation._inbound_nodes[node_index].input_tensors:
        yield from _with_weights_before(parent)
