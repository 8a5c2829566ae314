"""Which divergence belongs to which output of a model, and their sum."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_nrs.backend import eager_scope
from keras_nrs.backend import not_in_graphs
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence
from keras_nrs.divergences import GaussianKL
from keras_nrs.keras_internals import flat_losses
from keras_nrs.keras_internals import get_keras_mask
from keras_nrs.keras_internals import loss_arguments
from keras_nrs.keras_internals import producer
from keras_nrs.keras_internals import set_keras_mask
from keras_nrs.stateless import as_float

Tensor = Any

_CATEGORICAL = (
    keras.losses.categorical_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.kl_divergence,
)
_BERNOULLI = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
)
_GAUSSIAN = (
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.huber,
    keras.losses.log_cosh,
)


class OutputDivergence(NamedTuple):
    """The divergence of one output of a model.

    Attributes:
        paths: Ways to the output, to its labels and to its sample weights. The first
            leads to the output in the structure of the outputs. Labels and sample
            weights may have another structure, where another way leads to them.
        divergence: How the output is compared.
        weight: The weight of the output's loss.
        ignore_class: The label of positions that do not count.
    """

    paths: tuple[tuple[Any, ...], ...]
    divergence: Divergence
    weight: float | None = None
    ignore_class: int | None = None


def for_loss(loss: Any, output: Any, target: Any = None) -> Divergence:
    """The divergence that belongs to a loss: `divergence="auto"`.

    For losses other than Keras's own, the activation of the output decides, or
    integer labels if the loss does not change when all outputs grow by 1.

    Args:
        loss: The loss of the output.
        output: Tensor or `KerasTensor`, the output.
        target: Tensor of labels, if known.

    Raises:
        ValueError: if no divergence is known for the loss.
    """
    reduction = getattr(loss, "reduction", "sum_over_batch_size")
    function = getattr(loss, "fn", loss)
    kwargs = loss_arguments(loss)
    from_logits, axis = bool(kwargs.get("from_logits")), kwargs.get("axis", -1)
    if function in _CATEGORICAL:
        return CategoricalKL(from_logits, axis, reduction=reduction)
    if function in _BERNOULLI:
        return BernoulliKL(from_logits, axis, reduction=reduction)
    if function in _GAUSSIAN:
        return GaussianKL(reduction=reduction)
    activation, axis = _activation(output)
    if activation == "softmax":
        return CategoricalKL(axis=axis, reduction=reduction)
    if activation == "sigmoid":
        return BernoulliKL(reduction=reduction)
    if (
        activation == "linear"
        and _are_class_indices(target, output)
        and _is_of_logits(loss, target, output)
    ):
        return CategoricalKL(from_logits=True, reduction=reduction)
    name = getattr(function, "__name__", type(loss).__name__)
    raise ValueError(
        f"divergence='auto' knows no divergence for the loss {name!r}. Say what the "
        "model's outputs are: divergence=keras_nrs.divergences.CategoricalKL("
        "from_logits=...) for classes, BernoulliKL(from_logits=...) for binary or "
        "multi-label outputs, GaussianKL(stddev=...) for regression, or an instance "
        "of your own subclass of Divergence."
    )


def _activation(output: Any) -> tuple[str | None, int]:
    """Name and axis of the activation that made a symbolic output, if known."""
    operation = producer(output)
    if isinstance(operation, keras.layers.Softmax):
        return "softmax", operation.axis
    return getattr(getattr(operation, "activation", None), "__name__", None), -1


def _are_class_indices(target: Any, output: Any) -> bool:
    if target is None or not keras.backend.is_int_dtype(target.dtype):
        return False
    rank, classes = len(output.shape), output.shape[-1]
    is_sparse = len(target.shape) < rank or target.shape[-1] == 1
    return rank > 1 and classes is not None and classes > 1 and is_sparse


@not_in_graphs
def _is_of_logits(loss: Any, target: Any, output: Any) -> bool:
    """Whether a loss stays the same when all outputs grow by 1.

    A softmax makes it so. Quantiles, counts and probabilities have other losses.
    """
    shape = [min(size or 2, 2) for size in output.shape[:-1]]
    logits = np.random.default_rng(0).normal(size=(*shape, output.shape[-1]))
    if len(target.shape) == len(output.shape):
        shape.append(1)
    with eager_scope():
        # Class 1: losses for padded sequences leave out class 0.
        labels = ops.ones(shape, target.dtype)
        try:
            before, after = (
                as_float(ops.mean(loss(labels, ops.cast(z, output.dtype))))
                for z in (logits, logits + 1)
            )
        except Exception:  # The user's function raises it: nothing is known.
            return False
    return bool(np.isclose(before, after, rtol=1e-2))


@dataclass
class ChosenDivergences:
    """The divergences of a model's outputs, chosen at the first batch.

    Attributes:
        given: The argument `divergence` of `wrap()`.
        resolved: The divergence of each output, `None` before the first batch.
    """

    given: Any
    resolved: list[OutputDivergence] | None = None

    def of(self, model: Any, outputs: Any, targets: Any) -> list[OutputDivergence]:
        """The divergence of each output. `for_model()` describes the arguments."""
        if self.resolved is None:
            self.resolved = for_model(model, self.given, outputs, targets)
        return self.resolved


def for_model(
    model: Any, divergence: Any, outputs: Any, targets: Any = None
) -> list[OutputDivergence]:
    """The divergence of every output that has a loss.

    Args:
        model: A compiled model, which must not be wrapped.
        divergence: `"auto"`, one `Divergence` for all outputs, or a list or dict of
            them in the structure of the outputs.
        outputs: Tensors, the outputs of the model.
        targets: Tensors, the labels, if known.

    Raises:
        ValueError: if `divergence` does not fit the outputs, or if `"auto"` knows none
            for a loss, or if the model has no loss.
    """
    paths = [path for path, _ in keras.tree.flatten_with_path(outputs)]
    names = getattr(model, "output_names", None) or [None] * len(paths)
    losses = flat_losses(model, outputs)
    if not all(_positions(loss.path, outputs, names) for loss in losses or []):
        losses = None  # They are of what compute_loss() makes of the outputs.
    chosen: list[Divergence | None] = []
    if not _is_auto(divergence):
        chosen = _per_output(divergence, outputs, names)
    elif losses is None:
        raise ValueError(
            "divergence='auto' needs a model that is compiled with a loss of its "
            "outputs. Received: a model without one. Call compile(loss=...), or pass "
            "divergence=keras_nrs.divergences.CategoricalKL(from_logits=...)."
        )
    result: dict[Any, OutputDivergence] = {}
    for loss_path, loss, weight, _ in losses or [(path, *[None] * 3) for path in paths]:
        for position in _positions(loss_path, outputs, names):
            path = paths[position]
            # Labels may be in the structure of the outputs, of the losses, or by name.
            alternatives = (path, loss_path, (names[position],))
            if chosen:
                member = chosen[position]
            else:
                output = _symbolic(model, outputs, position)
                member = for_loss(loss, output, _member_at(targets, alternatives))
            # Of several losses of one output Keras minimizes the first.
            if member is not None and path not in result:
                result[path] = OutputDivergence(
                    alternatives, member, weight, ignored_class(loss)
                )
    return list(result.values())


def _symbolic(model: Any, outputs: Any, position: int) -> Any:
    """An output that knows the layer that made it, if there is one."""
    flat_outputs = keras.tree.flatten(outputs)
    symbolic = getattr(model, "outputs", None) or []
    return (symbolic if len(symbolic) == len(flat_outputs) else flat_outputs)[position]


def _positions(loss_path: tuple[Any, ...], outputs: Any, names: list[Any]) -> list[int]:
    """Positions of the outputs that a loss is of: one, or all of a structure.

    Compiled losses may name outputs that come as a list.
    """
    path = loss_path
    if path and path[0] in names and not isinstance(outputs, dict):
        path = (names.index(path[0]),) if keras.tree.is_nested(outputs) else ()
    paths = [path for path, _ in keras.tree.flatten_with_path(outputs)]
    return [i for i, other in enumerate(paths) if other[: len(path)] == path]


def ignored_class(loss: Any) -> int | None:
    """The label that a loss leaves out, `None` without one."""
    label: int | None = loss_arguments(loss).get("ignore_class")
    return label


def _per_output(
    divergence: Any, outputs: Any, names: list[Any]
) -> list[Divergence | None]:
    """The user's divergences in the order of the flattened outputs."""
    flat_outputs = keras.tree.flatten(outputs)
    if isinstance(divergence, Divergence):
        return [divergence] * len(flat_outputs)
    if isinstance(divergence, dict):
        keys = list(outputs) if isinstance(outputs, dict) else list(names)
        unknown = set(divergence) - set(keys)
        if unknown:
            raise ValueError(
                f"`divergence` must be a dict with keys among the outputs {keys}. "
                f"Received: the keys {sorted(map(str, unknown))}."
            )
        members = {key: divergence.get(key) for key in keys}
        divergence = members if isinstance(outputs, dict) else list(members.values())
    chosen: list[Divergence | None] = keras.tree.flatten(divergence)
    if len(chosen) != len(flat_outputs):
        raise ValueError(
            "`divergence` must be one Divergence, or a list or dict with one (or "
            f"None) for each of the model's {len(flat_outputs)} outputs. Received: "
            f"divergence={divergence!r}."
        )
    return chosen


def _is_auto(divergence: Any) -> bool:
    return isinstance(divergence, str) and divergence == "auto"


def check_divergence(divergence: Any) -> Any:
    """`divergence` itself, or an error if `wrap()` cannot take it."""
    valid = _is_auto(divergence) or isinstance(divergence, Divergence)
    if isinstance(divergence, list | tuple | dict):
        members = keras.tree.flatten(divergence)
        valid = any(isinstance(d, Divergence) for d in members) and all(
            d is None or isinstance(d, Divergence) for d in members
        )
    if not valid:
        raise ValueError(
            "`divergence` must be 'auto', a keras_nrs.divergences.Divergence, or a "
            f"list or dict of them. Received: divergence={divergence!r}."
        )
    return divergence


def total_divergence(
    divergences: Sequence[OutputDivergence],
    targets: Any,
    outputs: Any,
    perturbed_outputs: Any,
    sample_weight: Any,
) -> Tensor:
    """The sum over the outputs, with the weights of their losses.

    Sample weights and masks act on a divergence as they act on the loss.
    """
    total: Any = 0.0
    for paths, divergence, weight, ignore_class in divergences:
        perturbed = _member_at(perturbed_outputs, paths)
        labels = _member_at(targets, paths)
        if ignore_class is not None and labels is not None:
            perturbed = _with_ignored(perturbed, labels, ignore_class)
        weights = sample_weight
        if keras.tree.is_nested(sample_weight):
            weights = _member_at(sample_weight, paths)
        weights = copied_weights(weights)
        value = divergence(_member_at(outputs, paths), perturbed, weights)
        total = total + (value if weight is None else value * weight)
    return total


def as_means(divergences: Sequence[OutputDivergence]) -> list[OutputDivergence]:
    """The same divergences as means over the batch rather than sums."""

    def as_mean(output: OutputDivergence) -> OutputDivergence:
        if output.divergence.reduction != "sum":
            return output
        divergence = copy.copy(output.divergence)
        divergence.reduction = "sum_over_batch_size"
        return output._replace(divergence=divergence)

    return list(map(as_mean, divergences))


def copied_weights(weights: Any) -> Any:
    """A copy of sample weights: on PyTorch, Keras multiplies masks into them."""
    return keras.tree.map_structure(lambda w: None if w is None else 1 * w, weights)


def _member_at(structure: Any, paths: Sequence[tuple[Any, ...]]) -> Any:
    """The member at the first path that the structure has, `None` without one."""
    for path in paths:
        member = structure
        try:
            for key in path:
                member = member[key]
        except (KeyError, IndexError, TypeError):
            continue
        return member
    return None


def _with_ignored(output: Tensor, labels: Tensor, ignore_class: int) -> Tensor:
    """The output with a mask that leaves out positions of the ignored class."""
    labels = ops.cast(labels, "int32")
    if len(labels.shape) == len(output.shape):
        labels = ops.squeeze(labels, -1)
    counted = ops.not_equal(labels, ignore_class)
    mask = get_keras_mask(output)
    output = ops.copy(output)
    set_keras_mask(output, counted if mask is None else ops.logical_and(counted, mask))
    return output
