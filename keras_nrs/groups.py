"""Groups of samples that share one delta, and what is known of a batch of them."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree
from keras.src.backend.common.masking import set_keras_mask

from keras_nrs.objective import Terms

Tensor = Any


class Outcome(NamedTuple):
    """What a batch gives.

    Attributes:
        terms: The terms of Equation 3.
        y_pred: The outputs at theta.
        masks: The Keras masks of `y_pred`, or `None` for outputs without one.
        state: New values of the base model's non-trainable variables: the given
            tensor itself for those that did not change.
    """

    terms: Terms
    y_pred: Any
    masks: Any
    state: list[Tensor]


class Group(NamedTuple):
    """Samples of a batch that share one delta: from `start` to `stop`.

    Attributes:
        number: Which of the groups it is.
        start: Index of its first sample.
        stop: Index after its last.
        size: How many of them count: all, or none.
        share: `size` divided by the size of the batch.
        scale: The inverse of `share`, and finite if that is 0.
    """

    number: int
    start: Any
    stop: Any
    size: Any
    share: Any
    scale: Any


def split_into_groups(batch_size: Any, num_groups: int) -> list[Group]:
    """Groups of nearly equal size, and each one's share of the batch.

    With a batch size that is known there are no empty groups. With one that is a
    tensor, a group that would be empty borrows a sample of another, with a share of
    0, because the mean over no samples is not a number.
    """
    if num_groups == 1:
        return [Group(0, 0, batch_size, batch_size, 1.0, 1.0)]
    is_known = isinstance(batch_size, int)
    if is_known:
        num_groups = min(num_groups, batch_size)
    groups = []
    for i in range(num_groups):
        start, stop = i * batch_size // num_groups, (i + 1) * batch_size // num_groups
        size = stop - start
        if is_known:
            share, scale = size / batch_size, batch_size / size
        else:
            stop = ops.maximum(stop, start + 1)
            part, whole = (ops.cast(n, "float32") for n in (size, batch_size))
            share, scale = part / whole, whole / ops.maximum(part, 1.0)
        groups.append(Group(i, start, stop, size, share, scale))
    return groups


def _is_float(tensor: Tensor) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def mean_outcome(outcomes: Sequence[Outcome], groups: Sequence[Group]) -> Outcome:
    """The outcome of a batch from those of its groups."""
    if len(outcomes) == 1:
        return outcomes[0]

    def mean(*tensors: Tensor) -> Tensor:
        if not _is_float(tensors[0]) or all(t is tensors[0] for t in tensors):
            return tensors[0]
        return sum(
            ops.cast(group.share, tensor.dtype) * tensor
            for group, tensor in zip(groups, tensors, strict=True)
        )

    def joined(*tensors: Tensor) -> Tensor:
        if tensors[0] is None:
            return None
        parts = [t[: group.size] for group, t in zip(groups, tensors, strict=True)]
        return ops.concatenate(parts, axis=0)

    terms, y_preds, masks, states = zip(*outcomes, strict=True)
    return Outcome(
        Terms(*map(mean, *terms)),
        tree.map_structure(joined, *y_preds),
        tree.map_structure(joined, *masks),
        list(map(mean, *states)),
    )


def with_masks(outputs: Any, masks: Any) -> Any:
    """The outputs, carrying these Keras masks."""

    def with_mask(output: Tensor, mask: Tensor) -> Tensor:
        if mask is not None:
            set_keras_mask(output, mask)
        return output

    return tree.map_structure(with_mask, outputs, masks)


def samples_of(batch: Any, group: Group) -> Any:
    """The samples of one group."""
    return tree.map_structure(
        lambda t: None if t is None else t[group.start : group.stop], batch
    )


def num_samples(data: Any) -> Any:
    """The number of samples in a batch: an int where it is known."""
    return ops.shape(next(i for i in tree.flatten(data) if i is not None))[0]
