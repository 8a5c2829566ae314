"""The weights of a model's last layer, for each of its outputs."""

import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from keras_nrs import stateless
from keras_nrs.backend import compile_function
from keras_nrs.backend import gradient
from keras_nrs.batches import Batches
from keras_nrs.flatness.loss import full_precision
from keras_nrs.keras_internals import Functional
from keras_nrs.keras_internals import producer
from keras_nrs.keras_internals import producer_inputs
from keras_nrs.keras_internals import sublayers

Tensor = Any


def last_layer(model: Any, batches: Batches) -> list[keras.Variable]:
    """The trainable variables of the last layer, or layers, in any order.

    Args:
        model: A built model, which must not be wrapped.
        batches: The data. A subclassed model is called with the first batch, to find
            its last layer.
    """
    try:
        layers = list(_last_layers_of(model))
    except _UnknownGraphError:
        found: list[keras.Variable] = stateless.cached_on_model(
            model, "last_layer", lambda: _last_variables_in_call(model, batches)
        )
        return found
    return [v for layer in layers for v in layer.trainable_variables]


class _UnknownGraphError(Exception):
    """Keras does not know all operations that make an output."""


def _last_layers_of(model: Any) -> Iterator[keras.Layer]:
    """The last layers with trainable weights, on all paths back from each output."""
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if not outputs or type(model).call not in (Functional.call, keras.Sequential.call):
        raise _UnknownGraphError
    seen = set(map(id, outputs))
    while outputs:
        tensor = outputs.pop()
        operation = producer(tensor)
        # Other operations may have weights as arguments.
        if not isinstance(operation, keras.Layer):
            raise _UnknownGraphError
        if not operation.trainable_variables:
            # Each once: paths double at each layer that adds two of them.
            new = [t for t in producer_inputs(tensor) if id(t) not in seen]
            seen.update(map(id, new))
            outputs += new
        elif isinstance(operation, keras.Model):
            yield from _last_layers_of(operation)
        else:
            yield operation


def _last_variables_in_call(model: Any, batches: Batches) -> list[keras.Variable]:
    """The weights of the last layers, from derivatives of the outputs in all weights.

    All inputs of layers with weights are constants, so that only the weights of the
    last layers have a derivative.
    """
    variables = [
        v for v in model.trainable_variables if keras.backend.is_float_dtype(v.dtype)
    ]
    layers = list(_outermost_layers(model))
    read_by_model: set[int] = set()

    def total(values: list[Tensor], x: Any) -> Tensor:
        pairs = list(zip(variables, values, strict=True))
        scope = _LastLayerScope(pairs)
        with full_precision(model), scope, scope.constant_inputs(layers):
            outputs = model(x, **stateless.call_kwargs(model, training=False))
        read_by_model.update(scope.read_by_model)
        # The outputs may be without any derivative.
        nothing = 0.0 * ops.sum(values[0])
        return sum(map(_weighted_sum, keras.tree.flatten(outputs)), nothing)

    gradients = compile_function(
        lambda values, x: gradient(lambda v: total(v, x), values)
    )([ops.convert_to_tensor(v.value) for v in variables], next(iter(batches)).x)
    found = {
        id(v)
        for v, g in zip(variables, gradients, strict=True)
        if ops.any(ops.not_equal(g, 0))
    }
    for layer in layers:
        ids = {id(v) for v in layer.trainable_variables}
        if found & ids - read_by_model:
            found |= ids
    return [v for v in variables if id(v) in found]


def _outermost_layers(model: Any) -> Iterator[keras.Layer]:
    """The layers with trainable weights that a model, or one inside of it, calls."""
    for layer in sublayers(model):
        if isinstance(layer, keras.Model):
            yield from _outermost_layers(layer)
        elif layer.trainable_variables:
            yield layer


def _weighted_sum(output: Any) -> Tensor:
    """A sum with unequal weights: the plain sum of a softmax is constant."""
    if output is None or not keras.backend.is_float_dtype(output.dtype):
        return 0.0
    numbers = ops.arange(1, math.prod(output.shape) + 1, dtype="float32")
    return ops.sum(
        ops.cast(output, "float32") * ops.reshape(ops.cos(numbers), output.shape)
    )


class _LastLayerScope(keras.StatelessScope):  # type: ignore[misc]
    """A scope in which no derivative passes through a layer or kernel to its input.

    A kernel that the model reads by itself, outside of layers, has the value 0.

    Attributes:
        read_by_model: The ids of the variables that the model read by itself.
    """

    def __init__(self, values: Sequence[tuple[keras.Variable, Tensor]]) -> None:
        super().__init__(values, collect_losses=True)
        self.read_by_model: set[int] = set()
        self._depth = 0

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        value = super().get_current_value(variable)
        if value is None or self._depth:
            return value
        self.read_by_model.add(id(variable))
        return value - ops.stop_gradient(value) if len(variable.shape) > 1 else value

    @contextmanager
    def constant_inputs(self, layers: Sequence[keras.Layer]) -> Iterator[None]:
        """A context in which the inputs of these layers are constants."""
        names = "call", "quantized_call"
        for layer in layers:
            vars(layer).update(
                {n: self._with_constants(getattr(layer, n)) for n in names}
            )
        try:
            yield
        finally:
            for layer in layers:
                for name in names:
                    vars(layer).pop(name, None)

    def _with_constants(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def call_with_constants(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                args, kwargs = keras.tree.map_structure(
                    lambda a: ops.stop_gradient(a) if ops.is_tensor(a) else a,
                    (args, kwargs),
                )
            self._depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1

        return call_with_constants
