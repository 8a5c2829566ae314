"""Kronecker-factored recursive approximation: the paper's estimator."""

import math
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
from keras_nrs.keras_internals import producer
from keras_nrs.keras_internals import producer_inputs
from keras_nrs.keras_internals import sublayers

Array = NDArray[Any]
Tensor = Any

# Layers that change no value in inference mode.
_IDENTITIES = (
    keras.layers.Dropout,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)
_SHAPES = (keras.layers.Flatten, keras.layers.Reshape)
# Layers that act on each element by itself in inference mode.
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
        upper_bound: A bound on the exact eigenvalue of the last layer's Hessian, which
            is its block of the Gauss-Newton matrix: the largest eigenvalue of the
            inputs' second moments times the largest one of the output Hessians of all
            samples.
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
    """The largest Hessian eigenvalue by Kronecker factors, as in the paper's Table 3.

    The block of a Dense layer in the Gauss-Newton matrix is the mean of `a a.T ⊗ G`
    over the samples. The approximation is `mean(a a.T) ⊗ mean(G)`, whose largest
    eigenvalue is the product of the largest eigenvalues of its factors. Here a is the
    layer's input, with a 1 for the bias, and G is the Gauss-Newton matrix of its
    pre-activations. At the output G is the Hessian of the loss. Below a layer with
    kernel W it is `mean(f' f'.T) * (W @ mean(G) @ W.T)`, where f' are the derivatives
    of the activations.

    One pass over the data is enough. The result is exact if a and G are independent
    over the samples, and too large or too small otherwise: with few uncertain samples,
    the exact value depends on the inputs of these alone. Use this to compare with the
    paper, and `hessian_eigenvalues` for all else.

    Args:
        model: A built Sequential or functional model with one output, compiled with a
            cross-entropy or the mean squared error, wrapped or not. It must end with a
            Dense layer, its activation, and layers that do nothing in inference mode.
        x: Inputs: an array of shape `(num_samples, ...)` or a list or dict of them, or
            batches from a data set or generator. Labels do not matter.
        variables: `"last_layer"`, which allows any layers before the last, or `"all"`,
            which needs one chain of layers. Its layers with weights must be Dense or
            BatchNormalization, whose own weights have no block.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.

    Returns:
        A `KFRAEigenvalue`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model has a
            layer that the method does not cover.

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
    chain, activations = _dense_chain(model, only_last=variables == "last_layer")
    output_hessians = _output_hessians(model, activations)
    # `input` has the structure of the user's data, which `inputs` flattens.
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    tapped = keras.Model(inputs, [model.outputs[0], *(link.inputs for link in chain)])
    sums: list[Array] = []
    largest, count = 0.0, 0
    for batch in Batches(model, x, batch_size=batch_size, steps=steps):
        if batch.sample_weight is not None:
            raise ValueError(
                "`x` must not yield sample weights, which this method does not cover. "
                "Received: batches with sample weights. Use hessian_eigenvalues()."
            )
        with full_precision(model):
            output, *inputs = tapped(batch.x, training=False)
            _check_finite(model, [output, *inputs])
            slopes = [
                _activation_slopes(link, a)
                for link, a in zip(chain[1:], inputs[1:], strict=True)
            ]
        hessians = output_hessians(_to_float64(output))
        largest = max(largest, float(np.linalg.eigvalsh(hessians)[:, -1].max()))
        terms = [hessians.sum(axis=0)]
        terms += [
            _sum_of_input_products(link, a)
            for link, a in zip(chain, inputs, strict=True)
        ]
        terms += [f.T @ f for f in slopes]
        sums = [s + t for s, t in zip(sums, terms, strict=False)] or terms
        count += batch.num_samples
    block, *means = [total / count for total in sums]
    layers = {}
    for i, link in enumerate(chain):
        if i > 0:
            above = _to_float64(chain[i - 1].dense.kernel)
            block = means[len(chain) + i - 1] * (above @ block @ above.T)
        largest_of_factors = map(_largest_eigenvalue, (means[i], block))
        layers[link.dense.name] = math.prod(largest_of_factors)
    return KFRAEigenvalue(
        eigenvalue=max(layers.values()),
        layers=layers,
        upper_bound=_largest_eigenvalue(means[0]) * largest,
    )


def _check_finite(model: Any, tensors: list[Tensor]) -> None:
    if not all(ops.all(ops.isfinite(tensor)) for tensor in tensors):
        raise ValueError(
            "`model` must have finite outputs. Received: a model named "
            f"{model.name!r} with outputs that are not. Its training has probably "
            "diverged."
        )


def _largest_eigenvalue(matrix: Array) -> float:
    return float(np.linalg.eigvalsh(matrix)[-1])


def _to_float64(tensor: Tensor) -> Array:
    return ops.convert_to_numpy(tensor).astype("float64")


def _sum_of_input_products(link: "_Link", inputs: Tensor) -> Array:
    """The sum of a a.T over a batch, with a 1 in a for the bias."""
    a = _to_float64(inputs)
    if link.dense.use_bias:
        a = np.column_stack([a, np.ones(len(a))])
    return a.T @ a


def _activation_slopes(link: "_Link", inputs: Tensor) -> Array:
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

    return _to_float64(gradient(total, [ops.stop_gradient(h)])[0])


class _Link(NamedTuple):
    """A Dense layer, its symbolic inputs, and the elementwise functions after it."""

    dense: keras.layers.Dense
    inputs: Any
    functions: list[Callable[[Tensor], Tensor]]


def _dense_chain(model: Any, *, only_last: bool) -> tuple[list[_Link], list[str]]:
    """The Dense layers from the output backwards, and the output's activations."""
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) != 1 or producer(outputs[0]) is None:
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
        layer, parents = producer(tensor), producer_inputs(tensor)
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
        elif not _is_identity(layer, parents[0], tensor):
            break
        tensor = parents[0]
    _check_chain(model, chain, layer, only_last)
    names = [getattr(f, "activation", f) for f in output_functions]
    return chain, [getattr(f, "__name__", type(f).__name__).lower() for f in names]


def _is_identity(layer: Any, before: Any, after: Any) -> bool:
    """Whether a layer returns its input as it is, in inference mode."""
    is_same_shape = tuple(before.shape) == tuple(after.shape)
    return isinstance(layer, _IDENTITIES) or (
        isinstance(layer, _SHAPES) and is_same_shape
    )


def _is_elementwise(layer: Any, is_inside: bool) -> bool:
    """Whether a layer is an elementwise activation, or the softmax of the output."""
    if isinstance(layer, keras.layers.Softmax):
        return not is_inside
    if not isinstance(layer, keras.layers.Activation):
        return False
    return not is_inside or _acts_elementwise(layer.activation)


def _acts_elementwise(activation: Any) -> bool:
    name = getattr(activation, "__name__", "")
    return name not in ("softmax", "log_softmax", "sparsemax", "glu")


def _check_chain(model: Any, chain: list[_Link], last: Any, only_last: bool) -> None:
    """Raise an error if the chain is empty, or has not all layers that it must have."""
    if not chain or len(chain[0].inputs.shape) != 2:
        raise ValueError(
            "`model` must end with a Dense layer on inputs of shape (batch, features), "
            "its activation and layers that do nothing in inference mode. Received: a "
            f"model with {last.name!r}, a {type(last).__name__}, at the end. Use "
            "hessian_eigenvalues()."
        )
    names = [link.dense.name for link in chain]
    if len(set(names)) < len(names):
        raise ValueError(
            "`model` must call each layer once: the block of one that is called twice "
            f"has no Kronecker factors. Received: the layers {names[::-1]}. Use "
            "hessian_eigenvalues(variables='all')."
        )
    covered = {id(v) for link in chain for v in link.dense.trainable_variables}
    missing = [
        layer.name
        for layer in sublayers(model, recursive=True)
        if not isinstance(layer, keras.layers.BatchNormalization)
        and not sublayers(layer)
        and any(id(v) not in covered for v in layer.trainable_variables)
    ]
    if missing and not only_last:
        raise ValueError(
            "`variables` must be 'last_layer' unless all layers with weights are Dense "
            "layers in one chain. Received: variables='all' for a model in which the "
            f"layers {missing} are not covered. Use 'last_layer', or "
            "hessian_eigenvalues(variables='all')."
        )


def _output_hessians(model: Any, activations: list[str]) -> Callable[[Array], Array]:
    """A function from outputs to the Hessians of the loss in the pre-activations.

    It takes shape `(batch_size, d)` and returns shape `(batch_size, d, d)`.
    """
    activations = [name for name in activations if name not in ("linear", "identity")]
    (_, loss, weight, _), *_ = flat_losses(model, model.outputs[0]) or []
    function = getattr(loss, "fn", loss)
    categorical = (
        keras.losses.categorical_crossentropy,
        keras.losses.sparse_categorical_crossentropy,
    )
    binary = keras.losses.binary_crossentropy
    from_logits = loss_arguments(loss).get("from_logits", False)
    factor = 1.0 if weight is None else float(weight)
    if getattr(loss, "reduction", "") == "sum":
        raise ValueError(
            "`model` must be compiled with a loss that is a mean over the batch. "
            "Received: a loss with reduction='sum'. Use hessian_eigenvalues()."
        )
    if function in categorical and activations == ([] if from_logits else ["softmax"]):
        return lambda z: (
            factor * _softmax_hessians(softmax(z, axis=1) if from_logits else z)
        )
    if function is binary and activations == ([] if from_logits else ["sigmoid"]):
        return lambda z: factor * _sigmoid_hessians(expit(z) if from_logits else z)
    if function is keras.losses.mean_squared_error and not activations:
        return lambda z: (
            factor * 2 / z.shape[1] * np.tile(np.eye(z.shape[1]), (len(z), 1, 1))
        )
    name = getattr(function, "__name__", type(loss).__name__)
    raise ValueError(
        "`model` must be compiled with a cross-entropy of logits, a cross-entropy of "
        "its own softmax or sigmoid, or the mean squared error of a linear output. "
        f"Received: the loss {name!r} with from_logits={from_logits} after the "
        f"activations {activations}. Use hessian_eigenvalues()."
    )


def _softmax_hessians(p: Array) -> Array:
    return p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]


def _sigmoid_hessians(p: Array) -> Array:
    # Keras's loss is the mean over the outputs.
    return (p * (1 - p))[:, :, None] * np.eye(p.shape[1]) / p.shape[1]
