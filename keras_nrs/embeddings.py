"""Perturbed tables of embeddings, of which only the rows that a batch reads are drawn.

A table has a row for each token, and a batch reads few of them. Elsewhere a pass at
theta + delta adds delta to each variable. Here it adds the rows of delta to the rows of
theta after these have been looked up. The outputs and the gradients are the same.
"""

import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_nrs import keras_internals
from keras_nrs.backend import RandomStream
from keras_nrs.backend import take_rows

Tensor = Any

# Smaller tables are perturbed as other variables are: fewer operations are faster.
MIN_SIZE = 2**17
# How the layers read their tables. Subclasses may read them in other ways.
_CALLS = keras.layers.Embedding.call, keras.layers.ReversibleEmbedding.call


class PerturbedTable(NamedTuple):
    """The value of a table in a pass at theta + delta.

    Attributes:
        value: theta.
        moved: Gives theta + delta in some rows: of the values of these rows at theta,
            and their indices, of shape `(k,)`, or `None` for all.
    """

    value: Tensor
    moved: Callable[[Tensor, Tensor | None], Tensor]

    def whole(self) -> Tensor:
        """theta + delta in all rows."""
        return self.moved(self.value, None)


def readers(model: Any) -> dict[int, list[keras.Layer]]:
    """The layers that look up rows of a large table, by the `id` of its variable."""
    found: dict[int, list[keras.Layer]] = {}
    if not RandomStream.draws_rows:
        return found
    for layer in keras_internals.sublayers(model, recursive=True):
        # Another thread may be in `looking_up_rows()`.
        own_call = vars(layer).get("call")
        has_own_call = own_call and getattr(own_call, "func", None) is not _call
        if type(layer).call not in _CALLS or has_own_call:
            continue
        table = keras_internals.looked_up_table(layer)
        if table is not None and math.prod(table.shape) >= MIN_SIZE:
            found.setdefault(id(table), []).append(layer)
    return found


@contextmanager
def looking_up_rows(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """A context in which layers read the rows of a `PerturbedTable` only.

    Another thread that ends its context first lets them read whole tables again, which
    takes longer and has the same outputs.
    """
    for layer in layers:
        vars(layer)["call"] = functools.partial(_call, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _call(layer: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer's own `call()` does, with rows of its perturbed table."""
    tables = getattr(keras_internals.get_stateless_scope(), "tables", {})
    key = id(keras_internals.looked_up_table(layer))
    table = tables.get(key)
    is_reverse = args or kwargs.get("reverse")
    is_dense = type(inputs).__name__ not in ("RaggedTensor", "SparseTensor", "BCOO")
    if table is None or is_reverse or not is_dense or _reads_all(inputs, table.value):
        return type(layer).call(layer, inputs, *args, **kwargs)
    num_rows, length = table.value.shape
    indices = ops.reshape(ops.cast(inputs, "int32"), (-1,))
    rows, value = take_rows(table.value, indices)
    tables[key] = table._replace(value=value)
    # JAX counts negative indices from the end.
    indices = ops.where(indices < 0, indices + num_rows, indices)
    rows = ops.cast(table.moved(rows, indices), layer.compute_dtype)
    outputs = ops.reshape(rows, (*ops.shape(inputs), length))
    if isinstance(layer, keras.layers.ReversibleEmbedding):
        mask = keras.layers.Embedding.compute_mask(layer, inputs)
        if mask is not None:
            keras_internals.set_keras_mask(outputs, mask)
    return outputs


def _reads_all(inputs: Tensor, table: Tensor) -> bool:
    """Whether there are as many indices as rows, so that all may be read."""
    sizes = tuple(inputs.shape)
    return None not in sizes and math.prod(sizes) >= table.shape[0]
