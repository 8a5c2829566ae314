"""Compiling and differentiating functions on TensorFlow."""

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from typing import TypeVar

import tensorflow as tf

Tensor = Any
Function = TypeVar("Function", bound=Callable[..., Any])
Product = Callable[[list[Tensor]], list[Tensor]]

_STAGES = 32


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of tensors."""
    compiled: Callable[..., Any] = tf.function(
        function, reduce_retracing=True, autograph=False
    )
    return compiled


def gradient(
    function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    """The gradient of a scalar function of tensors in each of them."""
    gradients, _ = gradient_with(lambda tensors: (function(tensors), None), tensors)
    return gradients


def take_rows(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table, and the table: its gradient has the rows that were read."""
    return tf.gather(table, indices), table


def gradient_with(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], tensors: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """The gradient of a scalar function of tensors, and its other, constant result."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value, other = function(tensors)
    gradients = tape.gradient(value, tensors, unconnected_gradients="zero")
    # Gradients of embeddings are sparse.
    return list(map(tf.convert_to_tensor, gradients)), other


def reshape(tensor: Tensor, shape: Any) -> Tensor:
    """The tensor in another shape."""
    return tf.reshape(tensor, shape)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over all elements of all tensors."""
    # Without the squares in memory: 32 million elements take a tenth of the time.
    return 2 * sum(map(tf.nn.l2_loss, tensors))


def sums_of_squares(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The sums over some axes, which keep the length 1."""
    squares = tf.square(tensor)
    *rows, columns = tensor.shape
    if list(axes) == list(range(len(rows))) and math.prod(rows) % _STAGES == 0:
        # On the CPU sums of columns take half as long in two stages.
        stages = tf.reshape(squares, (_STAGES, math.prod(rows) // _STAGES, columns))
        sums = tf.reduce_sum(tf.reduce_sum(stages, axis=0), axis=0)
        return tf.reshape(sums, (*(1 for _ in rows), columns))
    return tf.reduce_sum(squares, axis=axes, keepdims=True)


def hessian_at(
    function: Callable[[list[Tensor], Any], Tensor],
) -> Callable[[list[Tensor], Any], Product]:
    """The Hessian of a scalar function of tensors and of other inputs.

    Returns:
        A function from a point (the tensors, and the other inputs) to the function
        from vectors, in the shapes of the tensors, to their products with the Hessian
        in the tensors.
    """

    def product(
        tensors: list[Tensor], inputs: Any, vectors: list[Tensor]
    ) -> list[Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            gradients = gradient(lambda t: function(t, inputs), tensors)
        products = tape.gradient(
            gradients, tensors, vectors, unconnected_gradients="zero"
        )
        return list(map(tf.convert_to_tensor, products))

    compiled = compile_function(product)
    return lambda tensors, inputs: functools.partial(compiled, tensors, inputs)


def eager_scope() -> AbstractContextManager[Any]:
    """A context whose operations have values, even where a program is compiled."""
    return tf.init_scope()


def not_in_graphs(function: Function) -> Function:
    """The function itself: all of it can be compiled."""
    return function
