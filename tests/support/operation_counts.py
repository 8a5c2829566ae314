"""Floating-point operations of matrix products and convolutions in a training step.

They are counted in the program, not timed: no other process can change them. Other
operations, of each element or weight, are left out.
"""

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import keras
import numpy as np

from tests.benchmarks.memory import step_and_state


def product_flops(model: keras.Model, x: np.ndarray, y: np.ndarray) -> int:
    """Operations of one training step on a batch, a product and a sum counted as two.

    Args:
        model: A compiled model, wrapped or not.
        x: Inputs of the batch.
        y: Labels of the batch.
    """
    count = {"jax": _of_jax, "tensorflow": _of_tensorflow, "torch": _of_torch}
    return count[keras.config.backend()](model, x, y)


def operations_on(
    shape: tuple[int, ...], model: keras.Model, x: np.ndarray, y: np.ndarray
) -> Counter[str]:
    """How often each operation gives a tensor of a shape, on JAX and TensorFlow."""
    model.train_on_batch(x, y)  # The first step builds what it needs.
    if keras.config.backend() == "jax":
        import jax

        step, state = step_and_state(model, x)
        jaxpr = jax.make_jaxpr(step)(state, (x, y, None)).jaxpr
        return Counter(_giving(shape, jaxpr))
    graph = _graph_of(model, x, y)
    operations = list(graph.get_operations())
    return Counter(
        operation.type
        for operation in operations
        if any(
            tuple(output.shape) == shape
            for output in operation.outputs
            if output.shape.rank is not None
        )
    )


def num_eager_operations(model: keras.Model, x: np.ndarray, y: np.ndarray) -> int:
    """The number of operations that PyTorch starts in a training step on a batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    model.train_on_batch(x, y)  # The first step builds what it needs.
    with Counting() as counting:
        model.train_on_batch(x, y)
    return counting.count


def _giving(shape: tuple[int, ...], jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        inner = [] if kind == "scatter-add" else list(_jaxprs_in(equation.params))
        for each in inner:
            yield from _giving(shape, each)
        if not inner and any(v.aval.shape == shape for v in equation.outvars):
            yield kind


def _of_jax(model: keras.Model, x: np.ndarray, y: np.ndarray) -> int:
    import jax

    model.train_on_batch(x, y)  # The first step builds what it needs.
    step, state = step_and_state(model, x)
    return _of_jaxpr(jax.make_jaxpr(step)(state, (x, y, None)).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        inner = [_of_jaxpr(inner) for inner in _jaxprs_in(parameters)]
        if kind == "cond":
            total += max(inner)
        else:
            total += sum(inner) * parameters.get("length", 1)
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            terms = prod(shapes[0][axis] for axis in contracted)
            total += 2 * prod(shapes[2]) * terms
        elif kind == "conv_general_dilated":
            channels = parameters["dimension_numbers"].rhs_spec[0]
            total += 2 * prod(shapes[2]) * prod(shapes[1]) // shapes[1][channels]
    return total


def _jaxprs_in(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            item = getattr(item, "jaxpr", item)  # A closed one holds its constants.
            if hasattr(item, "eqns"):
                yield item


def _of_tensorflow(model: keras.Model, x: np.ndarray, y: np.ndarray) -> int:
    graph = _graph_of(model, x, y)
    products = ("MatMul", "Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter")
    for function in graph.as_graph_def().library.function:
        hidden = [node.name for node in function.node_def if node.op in products]
        assert not hidden, f"Shapes of {hidden} in {function.signature.name} unknown."
    return sum(_of_operation(o) for o in graph.get_operations() if o.type in products)


def _graph_of(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Any:
    import tensorflow as tf

    model.optimizer.build(model.trainable_variables)
    data = tf.constant(x), tf.constant(y)
    step = tf.function(lambda: model.train_step(data), autograph=False)
    return step.get_concrete_function().graph


def _of_operation(operation: Any) -> int:
    first, second = (tuple(tensor.shape) for tensor in list(operation.inputs)[:2])
    result = tuple(operation.outputs[0].shape)
    if operation.type == "MatMul":
        return 2 * prod(result) * first[0 if operation.get_attr("transpose_a") else 1]
    # Each output of the forward convolution is a sum over a filter.
    if operation.type == "Conv2D":
        return 2 * prod(result) * prod(second[:-1])
    outputs = tuple(operation.inputs[2].shape)
    is_filter = operation.type == "Conv2DBackpropFilter"
    return 2 * prod(outputs) * prod((result if is_filter else second)[:-1])


def _of_torch(model: keras.Model, x: np.ndarray, y: np.ndarray) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    model.train_on_batch(x, y)  # The first step builds what it needs.
    with FlopCounterMode(display=False) as counter:
        model.train_on_batch(x, y)
    return int(counter.get_total_flops())
