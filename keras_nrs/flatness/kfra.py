"""Kronecker-factored recursive approximation: the paper's estimator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray
from scipy.special import expit
from scipy.special import softmax

from keras_nrs._checks import check_choice
from keras_nrs.backend import gradient
from keras_nrs.batches import Batches
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.loss import full_precision
from keras_nrs.keras_internals import flat_losses
from keras_nrs.keras_internals import loss_arguments

Array = NDArray[Any]
Tensor = Any

# In inference mode these leave every value as it is.
_IDENTITIES = (
    keras.layers.Dropout,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)
_SHAPES = (keras.layers.Flatten, keras.layers.Reshape)
# In inference mode these act on every element by itself.
_ELEMENTWISE = (
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.PReLU,
    keras.layers.BatchNormalization,
    keras.layers.Rescaling,
)


@dataclass(frozen=True, kw_only=True)
class KFRAEigenvalue:
    """The largest eigenvalue of a block-diagonal approximation of the Hessian.

    Attributes:
        eigenvalue: The largest over the layers, in the unit of the loss per squared
            weight.
        layers: The eigenvalue of each layer's block, by the layer's name.
        upper_bound: What the exact eigenvalue of the last layer's block of the
            Gauss-Newton matrix (which is its Hessian) cannot exceed: the largest
            eigenvalue of the inputs' second moments times the largest of the outputs'
            Hessian over the samples.
    """

    eigenvalue: float
    layers: dict[str, float]
    upper_bound: float


def kfra_max_eigenvalue(
    model: keras.Model,
    x: Any,
    *,
    variables: str = "last_layer",
    batch_size: int = 32,
    steps: int | None = None,
) -> KFRAEigenvalue:
    """The largest Hessian eigenvalue by Kronecker factors: what Table 3 reports.

    For each Dense layer the block of the Gauss-Newton matrix, the mean over the samples
    of `a a.T ⊗ G`, is replaced by `mean(a a.T) ⊗ mean(G)`, whose largest eigenvalue is
    the product of those of the factors. a is the layer's input, with a 1 for the bias,
    and G the Gauss-Newton matrix of the layer's pre-activations: at the output the
    Hessian of the loss, and recursively `mean(f' f'.T) * (W @ mean(G) @ W.T)` below a
    layer with kernel W, where f' are the derivatives of the activations.

    It is exact where a and G are independent of each other over the samples, and needs
    one pass over the data. Elsewhere it can be too large or too small: where few
    samples are uncertain the exact value depends on their inputs alone. Prefer
    `hessian_eigenvalues`, and use this one to compare with the paper.

    Args:
        model: A built Sequential or functional model with one output, compiled with a
            cross-entropy or the mean squared error, wrapped or not. It must end with a
            Dense layer, its activation and what does nothing in inference mode.
        x: Inputs: an array of shape `(num_samples, ...)` or a list or dict of them, or
            batches from a data set or generator. Labels do not matter.
        variables: `"last_layer"`, after whatever layers, or `"all"`, if all layers
            with weights are Dense or BatchNormalization (whose own weights have no
            block), in one chain.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.

    Returns:
        A `KFRAEigenvalue`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or if the model has
            a layer that the method does not cover.

    References:
        [Botev et al., 2017](https://arxiv.org/abs/1706.03662), Section 3;
        [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Section 5.2.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    >>> result = keras_nrs.flatness.kfra_max_eigenvalue(model, x)
    >>> round(result.eigenvalue, 3)
    5.303
    """
    check_choice("variables", variables, ("last_layer", "all"))
    model = base_model(model)
    chain, activations = _chain(model, only_last=variables == "last_layer")
    output_hessians = _output_hessians(model, activations)
    # In the structure that the user's data has; that of a Sequential is in its core.
    inputs_of_model = (getattr(model, "_functional", None) or model)._inputs_struct
    parts = keras.Model(inputs_of_model, [model.outputs[0], *(c.inputs for c in chain)])
    sums: list[Array] = []
    largest, count = 0.0, 0
    for batch in Batches(model, x, batch_size=batch_size, steps=steps):
        if batch.sample_weight is not None:
            raise ValueError(
                "`x` must yield no sample weights, which the method does not know. "
                "Received: batches with them. Use hessian_eigenvalues()."
            )
        with full_precision(model):
            output, *inputs = parts(batch.x, training=False)
            slopes = [_slopes(c, a) for c, a in zip(chain[1:], inputs[1:], strict=True)]
        hessians = output_hessians(_array(output))
        largest = max(largest, float(np.linalg.eigvalsh(hessians)[:, -1].max()))
        terms = [hessians.sum(axis=0)]
        terms += [_with_one(c, a) for c, a in zip(chain, inputs, strict=True)]
        terms += [f.T @ f for f in slopes]
        sums = [s + t for s, t in zip(sums, terms, strict=False)] or terms
        count += batch.num_samples
    block, *means = [total / count for total in sums]
    layers = {}
    for i, link in enumerate(chain):
        if i > 0:
            above = _array(chain[i - 1].dense.kernel)
            block = means[len(chain) + i - 1] * (above @ block @ above.T)
        layers[link.dense.name] = _largest(means[i]) * _largest(block)
    return KFRAEigenvalue(
        eigenvalue=max(layers.values()),
        layers=layers,
        upper_bound=_largest(means[0]) * largest,
    )


def _largest(matrix: Array) -> float:
    return float(np.linalg.eigvalsh(matrix)[-1])


def _array(tensor: Tensor) -> Array:
    return ops.convert_to_numpy(tensor).astype("float64")


def _with_one(link: "_Link", inputs: Tensor) -> Array:
    """The sum of a a.T over a batch, with a 1 in a for the bias."""
    a = _array(inputs)
    if link.dense.use_bias:
        a = np.column_stack([a, np.ones(len(a))])
    return a.T @ a


def _slopes(link: "_Link", inputs: Tensor) -> Array:
    """The derivatives of the functions after a Dense layer, at its pre-activations."""
    dense = link.dense
    h = ops.matmul(inputs, dense.kernel)
    if dense.use_bias:
        h = h + dense.bias

    def total(tensors: list[Tensor]) -> Tensor:
        (value,) = tensors
        for function in link.functions:
            value = function(value)
        return ops.sum(value)

    return _array(gradient(total, [ops.stop_gradient(h)])[0])


class _Link(NamedTuple):
    """A Dense layer, its symbolic inputs, and the elementwise functions after it."""

    dense: keras.layers.Dense
    inputs: Any
    functions: list[Callable[[Tensor], Tensor]]


def _chain(model: Any, *, only_last: bool) -> tuple[list[_Link], list[str]]:
    """The Dense layers from the output backwards, and the output's activations."""
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) != 1 or not hasattr(outputs[0], "_keras_history"):
        raise ValueError(
            "`model` must be a Sequential or functional model with one output. "
            f"Received: a {type(model).__name__} with {len(outputs)} known outputs. "
            "Use hessian_eigenvalues()."
        )
    chain: list[_Link] = []
    functions: list[Any] = []
    tensor = outputs[0]
    output_functions: list[Any] = []
    while True:
        layer, node_index, _ = tensor._keras_history
        parents = layer._inbound_nodes[node_index].input_tensors
        if len(parents) != 1:
            break
        if isinstance(layer, keras.layers.Dense):
            if chain and not _acts_elementwise(layer.activation):
                break
            functions = [layer.activation, *functions]
            output_functions = output_functions if chain else functions
            chain.append(_Link(layer, parents[0], functions))
            functions = []
            if only_last:
                break
        elif isinstance(layer, _ELEMENTWISE) or _is_elementwise(layer, bool(chain)):
            functions.insert(0, layer)
        elif not _does_nothing(layer, parents[0], tensor):
            break
        tensor = parents[0]
    _check_covered(model, chain, layer, only_last)
    names = [getattr(f, "activation", f) for f in output_functions]
    return chain, [getattr(f, "__name__", type(f).__name__).lower() for f in names]


def _does_nothing(layer: Any, before: Any, after: Any) -> bool:
    """Whether this layer gives what it is given, in inference mode."""
    is_same_shape = tuple(before.shape) == tuple(after.shape)
    return isinstance(layer, _IDENTITIES) or (
        isinstance(layer, _SHAPES) and is_same_shape
    )


def _is_elementwise(layer: Any, is_inside: bool) -> bool:
    """Whether this is an activation; softmax, which is none, may end the model."""
    if isinstance(layer, keras.layers.Softmax):
        return not is_inside
    if not isinstance(layer, keras.layers.Activation):
        return False
    return not is_inside or _acts_elementwise(layer.activation)


def _acts_elementwise(activation: Any) -> bool:
    name = getattr(activation, "__name__", "")
    return name not in ("softmax", "log_softmax", "sparsemax", "glu")


def _check_covered(model: Any, chain: list[_Link], last: Any, only_last: bool) -> None:
    """Raise an error if there is no chain, or if layers are missing in it."""
    if not chain or len(chain[0].inputs.shape) != 2:
        raise ValueError(
            "`model` must end with a Dense layer on inputs of shape (batch, features), "
            "its activation and layers that do nothing in inference mode. Received: a "
            f"model that ends with {last.name!r}, a {type(last).__name__}. Use "
            "hessian_eigenvalues()."
        )
    covered = {id(v) for link in chain for v in link.dense.trainable_variables}
    missing = [
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, keras.layers.BatchNormalization)
        and not list(layer._flatten_layers(include_self=False))
        and any(id(v) not in covered for v in layer.trainable_variables)
    ]
    if missing and not only_last:
        raise ValueError(
            "`variables` must be 'last_layer' where a model has other layers with "
            "weights than Dense ones in one chain. Received: variables='all', and the "
            f"layers {missing} are not covered. Use 'last_layer', or "
            "hessian_eigenvalues(variables='all')."
        )


def _output_hessians(model: Any, activations: list[str]) -> Callable[[Array], Array]:
    """The function from a batch of outputs to the Hessians of their losses.

    In the last layer's pre-activations: shape `(batch_size, d, d)` for outputs of
    shape `(batch_size, d)`.
    """
    activations = [name for name in activations if name not in ("linear", "identity")]
    (_, loss, weight, _), *_ = flat_losses(model, model.outputs[0]) or []
    function = getattr(loss, "fn", loss)
    from_logits = loss_arguments(loss).get("from_logits", False)
    factor = 1.0 if weight is None else float(weight)
    if getattr(loss, "reduction", "") == "sum":
        raise ValueError(
            "`model` must be compiled with a loss that is a mean over the batch. "
            "Received: a loss with reduction='sum'. Use hessian_eigenvalues()."
        )
    losses = keras.losses
    if function in (
        losses.categorical_crossentropy,
        losses.sparse_categorical_crossentropy,
    ) and activations == ([] if from_logits else ["softmax"]):
        return lambda z: factor * _of_softmax(softmax(z, axis=1) if from_logits else z)
    if function is losses.binary_crossentropy and activations == (
        [] if from_logits else ["sigmoid"]
    ):
        return lambda z: factor * _of_sigmoid(expit(z) if from_logits else z)
    if function is losses.mean_squared_error and not activations:
        return lambda z: (
            factor * 2 / z.shape[1] * np.tile(np.eye(z.shape[1]), (len(z), 1, 1))
        )
    name = getattr(function, "__name__", type(loss).__name__)
    raise ValueError(
        "`model` must be compiled with a cross-entropy, of logits or after the softmax "
        "or sigmoid that belongs to it, or with the mean squared error of a linear "
        f"output. Received: the loss {name!r} with from_logits={from_logits} after the "
        f"activations {activations}. Use hessian_eigenvalues()."
    )


def _of_softmax(p: Array) -> Array:
    return p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]


def _of_sigmoid(p: Array) -> Array:
    """Of the mean over the outputs, as Keras's loss is."""
    return (p * (1 - p))[:, :, None] * np.eye(p.shape[1]) / p.shape[1]


def _of_squares(batch_size: int, size: int) -> Array:
    return np.tile(2 / size * np.eye(size), (batch_size, 1, 1))
