"""Compiling and differentiating functions on PyTorch."""

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel

Tensor = Any
Function = TypeVar("Function", bound=Callable[..., Any])
Product = Callable[[list[Tensor]], list[Tensor]]

# Elements of a block: 512 KiB of float32.
_BLOCK = 2**17
# Elements of a row: few enough to be summed one by one.
_ROW = 2**12


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, without gradients: PyTorch runs eagerly."""
    without_gradients: Callable[..., Any] = torch.no_grad()(function)
    return without_gradients


def gradient(
    function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    """The gradient of a scalar function of tensors in each of them."""
    return _gradient(function, [t.detach().requires_grad_() for t in tensors])


def _gradient(
    function: Callable[[list[Tensor]], Tensor],
    tensors: list[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    with torch.enable_grad():
        value = function(tensors)
    gradients = torch.autograd.grad(
        value,
        tensors,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(gradients)


def take_rows(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table, and the table, as on other backends."""
    return torch.nn.functional.embedding(indices, table), table


def gradient_with(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], tensors: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """The gradient of a scalar function of tensors, and its other, constant result."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        value, other = function(tensors)
    gradients = torch.autograd.grad(
        value, tensors, allow_unused=True, materialize_grads=True
    )
    return list(gradients), other


def reshape(tensor: Tensor, shape: Any) -> Tensor:
    """The tensor in another shape."""
    return torch.reshape(tensor, shape)


def _is_large(tensor: Tensor, size: int = _BLOCK) -> bool:
    """Whether it is on the CPU and has more elements than this.

    By default so many that each pass over its memory counts.
    """
    return bool(tensor.device.type == "cpu" and tensor.numel() > size)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over all elements of all tensors."""
    small = [tensor for tensor in tensors if not _is_large(tensor, _ROW)]
    squares = [_sum_of_squares(tensor) for tensor in tensors if _is_large(tensor, _ROW)]
    if small:
        # In one operation: each takes longer to start than to run.
        squares.append(torch.nn.utils.get_total_norm(small).square())
    return sum(squares)


def _sum_of_squares(tensor: Tensor) -> Tensor:
    if not _is_large(tensor):
        return tensor.square().sum()
    # One pass over memory, and a third of the time. By rows: PyTorch's norm of 4
    # million elements at once is wrong by 1e-4.
    num_rows, num_rest = divmod(tensor.numel(), _ROW)
    rows, rest = tensor.reshape(-1).split([num_rows * _ROW, num_rest])
    norms = torch.linalg.vector_norm(rows.view(-1, _ROW), dim=1)
    return norms.square().sum() + torch.dot(rest, rest)


def sums_of_squares(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The sums over some axes, which keep the length 1."""
    if not _is_large(tensor) or list(axes) != list(range(tensor.ndim - 1)):
        return tensor.square().sum(tuple(axes), keepdim=True)
    # By blocks that stay in the cache: a third of the time.
    rows = tensor.reshape(-1, tensor.shape[-1])
    first, *others = rows.split(max(1, _BLOCK // tensor.shape[-1]))
    sums = first.square()
    for block in others:
        sums[: len(block)].addcmul_(block, block)
    return sums.sum(0).reshape([1] * (tensor.ndim - 1) + [-1])


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

    def at(tensors: list[Tensor], inputs: Any) -> Product:
        tensors = [t.detach().requires_grad_() for t in tensors]
        # The other kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = _gradient(
                lambda t: function(t, inputs), tensors, create_graph=True
            )
        _check_differentiable(gradients)
        # A gradient that does not depend on any of the tensors has no graph.
        varying = [i for i, g in enumerate(gradients) if g.requires_grad]

        def product(vectors: list[Tensor]) -> list[Tensor]:
            if not varying:
                return [torch.zeros_like(t) for t in tensors]
            products = torch.autograd.grad(
                [gradients[i] for i in varying],
                tensors,
                [vectors[i] for i in varying],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return list(products)

        return product

    return at


def _check_differentiable(gradients: list[Tensor]) -> None:
    """Raise an error where PyTorch would take a derivative for zero.

    After an operation with `once_differentiable` there is a node that fails, but only
    if it is run, and as it leads nowhere it never is.
    """
    nodes = {g.grad_fn for g in gradients if g.grad_fn is not None}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error" or type(node).__name__ == "Error":
            raise RuntimeError("An operation is marked as once_differentiable.")
        following = {child for child, _ in node.next_functions if child is not None}
        nodes |= following - seen
        seen |= following


def eager_scope() -> AbstractContextManager[Any]:
    """A context whose operations have values, even where a program is compiled."""
    return nullcontext()


def not_in_graphs(function: Function) -> Function:
    """A function that `torch.compile` leaves out of its graphs.

    No graph can hold a generator of random numbers, and a number that changes at each
    step would compile each step anew.
    """
    disabled: Function = torch.compiler.disable(function)
    return disabled
