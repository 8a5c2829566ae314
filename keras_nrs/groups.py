"""Groups of samples that share one delta, and what is known of a batch of them."""

import math
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree
from keras.src.backend.common.masking import set_keras_mask

from keras_nrs.objective import Terms

Tensor = Any


class StepInputs(NamedTuple):
    """What the objective on the batch of one replica depends on, besides the weights.

    Attributes:
        state: Values of the base model's non-trainable variables, the same for all
            replicas.
        metrics: Values of its metrics' variables.
        batch: The data, as Keras gives it to `train_step()`.
        eps: Size of the neighborhood.
        alpha: Weight of the divergence.
        key: What the `SeedGenerator` of the perturbations gave at this step.
        replica: Index of the replica among all of them.
        num_replicas: Over how many replicas the caller averages the terms.
    """

    state: list[Tensor]
    metrics: list[Tensor]
    batch: Any
    eps: Tensor
    alpha: Tensor
    key: Tensor
    replica: Any = 0
    num_replicas: int = 1


class Outcome(NamedTuple):
    """What a batch gives.

    Attributes:
        terms: The terms of Equation 3. Its total is the loss until they are combined.
        penalty: The part of `terms.loss` that does not depend on the outputs.
        y_pred: The outputs at theta.
        masks: The Keras masks of `y_pred`, or `None` for outputs without one.
        state: New values of the base model's non-trainable variables: the given
            tensor itself for those that did not change.
    """

    terms: Terms
    penalty: Tensor
    y_pred: Any
    masks: Any
    state: list[Tensor]


class Group(NamedTuple):
    """Samples of a batch that share their dropout masks and batch moments.

    Attributes:
        number: Which delta is theirs.
        is_perturbed: Whether the perturbed pass runs on them.
        start: Index of the first sample.
        stop: Index after the last.
        size: How many of them count: all, or none.
        share: `size` divided by the size of the batch.
        scale: The inverse of `share`, and finite if that is 0.
        share_of_perturbed: `size` divided by the number of samples on which the
            perturbed pass runs, or 0 if this group is not one of them.
    """

    number: int
    is_perturbed: bool
    start: Any
    stop: Any
    size: Any
    share: Any
    scale: Any
    share_of_perturbed: Any


class Part(NamedTuple):
    """What one group is run on.

    Attributes:
        group: Which samples those are.
        data: The samples.
        stream: Index of its delta among those of all replicas.
        state: The state of the base model, with random seeds of its own.
        seeds: What was added to the seeds for that, `None` for other variables.
    """

    group: Group
    data: Any
    stream: Any
    state: list[Tensor]
    seeds: list[Tensor | None]


def split_into_groups(
    batch_size: Any, num_perturbations: int, perturbed_fraction: float
) -> list[Group]:
    """The groups of a batch: a perturbed one for each delta, and the others.

    There is one sample at least in a perturbed group. With a batch size that is known
    there are no empty groups. With one that is a tensor, a group that would be empty
    borrows a sample of another, with a share of 0, because the mean over no samples
    is not a number.
    """
    is_known = isinstance(batch_size, int)
    if num_perturbations == 1 and perturbed_fraction == 1:
        return [Group(0, True, 0, batch_size, batch_size, 1.0, 1.0, 1.0)]
    minimum, maximum = (min, max) if is_known else (ops.minimum, ops.maximum)
    num_deltas = min(num_perturbations, batch_size) if is_known else num_perturbations
    spans = []
    for i in range(num_deltas):
        start, stop = i * batch_size // num_deltas, (i + 1) * batch_size // num_deltas
        num_perturbed = _rounded_share(perturbed_fraction, stop - start)
        middle = start + minimum(stop - start, maximum(num_perturbed, 1))
        spans.append((i, True, start, middle))
        if perturbed_fraction < 1:
            spans.append((i, False, middle, stop))
    num_perturbed = sum(
        stop - start for _, is_perturbed, start, stop in spans if is_perturbed
    )
    groups = []
    for number, is_perturbed, start, stop in spans:
        size = stop - start
        if is_known and size == 0:
            continue
        share, scale = _ratio(size, batch_size), _ratio(batch_size, maximum(size, 1))
        share_of_perturbed = _ratio(size, num_perturbed) if is_perturbed else 0.0
        if not is_known:
            start = minimum(start, batch_size - 1)
            stop = maximum(stop, start + 1)
        fields = (number, is_perturbed, start, stop, size, share, scale)
        groups.append(Group(*fields, share_of_perturbed))
    return groups


def _rounded_share(fraction: float, size: Any) -> Any:
    if isinstance(size, int):
        return math.floor(fraction * size + 0.5)
    share = fraction * ops.cast(size, "float32") + 0.5
    return ops.cast(ops.floor(share), size.dtype)


def _ratio(part: Any, whole: Any) -> Any:
    if isinstance(part, int) and isinstance(whole, int):
        return part / whole
    return ops.cast(part, "float32") / ops.cast(whole, "float32")


def _is_float(tensor: Tensor) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def mean_outcome(outcomes: Sequence[Outcome], groups: Sequence[Group]) -> Outcome:
    """The outcome of a batch from those of its groups, before terms are combined.

    The loss is the mean over all samples, the divergence and the perturbed loss are
    those over the perturbed groups.
    """
    if len(outcomes) == 1:
        return outcomes[0]

    def mean(tensors: Sequence[Tensor], shares: Sequence[Any]) -> Tensor:
        if not _is_float(tensors[0]) or all(t is tensors[0] for t in tensors):
            return tensors[0]
        return sum(
            ops.cast(share, tensor.dtype) * tensor
            for share, tensor in zip(shares, tensors, strict=True)
        )

    def joined(*tensors: Tensor) -> Tensor:
        if tensors[0] is None:
            return None
        parts = [t[: group.size] for group, t in zip(groups, tensors, strict=True)]
        return ops.concatenate(parts, axis=0)

    shares = [group.share for group in groups]
    shares_of_perturbed = [group.share_of_perturbed for group in groups]
    terms, penalties, y_preds, masks, states = zip(*outcomes, strict=True)
    _, losses, divergences, perturbed_losses = zip(*terms, strict=True)
    loss = mean(losses, shares)
    return Outcome(
        Terms(
            loss,
            loss,
            mean(divergences, shares_of_perturbed),
            mean(perturbed_losses, shares_of_perturbed),
        ),
        mean(penalties, shares),
        tree.map_structure(joined, *y_preds),
        tree.map_structure(joined, *masks),
        [mean(values, shares) for values in zip(*states, strict=True)],
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
