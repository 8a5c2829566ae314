"""Compiling and differentiating functions on JAX."""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from typing import TypeVar

import jax

Tensor = Any
Function = TypeVar("Function", bound=Callable[..., Any])
Product = Callable[[list[Tensor]], list[Tensor]]


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of tensors."""
    compiled: Callable[..., Any] = jax.jit(function)
    return compiled


def gradient(
    function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    """The gradient of a scalar function of tensors in each of them."""
    gradients: list[Tensor] = jax.grad(function)(tensors)
    return gradients


def reshape(tensor: Tensor, shape: Any) -> Tensor:
    """The tensor in another shape."""
    return jax.numpy.reshape(tensor, shape)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over all elements of all tensors."""
    return sum(jax.numpy.sum(jax.numpy.square(tensor)) for tensor in tensors)


def sums_of_squares(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The sums over some axes, which keep the length 1."""
    return jax.numpy.sum(jax.numpy.square(tensor), axis=tuple(axes), keepdims=True)


@jax.custom_vjp  # type: ignore[untyped-decorator]
def take_rows(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table, and the table, for what reads it next.

    The gradient of the rows is added in place to that of the returned table. So all
    that read a table one after the other share one gradient of its size.
    """
    return jax.numpy.take(table, indices, axis=0), table


def _take_rows_forward(table: Tensor, indices: Tensor) -> Any:
    return take_rows(table, indices), indices


def _take_rows_backward(indices: Tensor, cotangents: tuple[Tensor, Tensor]) -> Any:
    of_rows, of_table = cotangents
    return of_table.at[indices].add(of_rows), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def gradient_with(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], tensors: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """The gradient of a scalar function of tensors, and its other, constant result."""
    gradients, other = jax.grad(function, has_aux=True)(tensors)
    return gradients, other


def hessian_at(
    function: Callable[[list[Tensor], Any], Tensor],
) -> Callable[[list[Tensor], Any], Product]:
    """The Hessian of a scalar function of tensors and of other inputs.

    Returns:
        A function from a point (the tensors, and the other inputs) to the function
        from vectors, in the shapes of the tensors, to their products with the Hessian
        in the tensors. All products at a point share one computation of
        the gradient.
    """
    in_tensors = jax.grad(function)

    def linear_function(tensors: list[Tensor], inputs: Any) -> Any:
        # A GPU multiplies float32 in 10 bits otherwise.
        with jax.default_matmul_precision("float32"):
            # Adding nothing: before 0.10, JAX leaks a tracer of a constant gradient.
            return jax.linearize(
                lambda t: [
                    g + 0 * w for g, w in zip(in_tensors(t, inputs), t, strict=True)
                ],
                tensors,
            )[1]

    # Forward over reverse. The linear function is a pytree of its kept tensors.
    linearize = jax.jit(linear_function)
    apply = jax.jit(lambda linear, vectors: linear(vectors))
    return lambda tensors, inputs: functools.partial(apply, linearize(tensors, inputs))


def eager_scope() -> AbstractContextManager[Any]:
    """A context whose operations have values, even where a program is compiled."""
    return jax.ensure_compile_time_eval()


def not_in_graphs(function: Function) -> Function:
    """The function itself: all of it can be compiled."""
    return function
