"""Groups of samples that share one delta, and what is known of a batch of them."""

import math
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree
from keras.src.backend.common.masking import set_keras_mask

from keras_nrs.step.objective import Terms

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
        start: Index of the first sample.
        stop: Index after the last.
        num_perturbed: On how many of them, from the first, the perturbed pass runs:
            `None` for all, and the int 0 for none.
        size: How many of them count: all, or none.
        share: `size` divided by the size of the batch.
        scale: The inverse of `share`, and finite if that is 0.
        perturbed_share: The part of the samples on which the perturbed pass runs
            that is in this group.
        perturbed_scale: The size of the batch divided by the number of those.
    """

    number: int
    start: Any
    stop: Any
    num_perturbed: Any
    size: Any
    share: Any
    scale: Any
    perturbed_share: Any
    perturbed_scale: Any

    @property
    def is_perturbed(self) -> bool:
        return not isinstance(self.num_perturbed, int) or self.num_perturbed > 0


class Part(NamedTuple):
    """What one group is run on.

    Attributes:
        group: Which samples those are.
        data: The samples.
        perturbed_data: Those on which the perturbed pass runs.
        stream: Index of its delta among those of all replicas.
        state: The state of the base model, with random seeds of its own.
        seeds: What was added to the seeds for that, `None` for other variables.
    """

    group: Group
    data: Any
    perturbed_data: Any
    stream: Any
    state: list[Tensor]
    seeds: list[Tensor | None]


def split_into_groups(
    batch_size: Any,
    num_perturbations: int = 1,
    perturbed_fraction: float = 1.0,
    *,
    keep_whole: bool = False,
) -> list[Group]:
    """The groups of a batch.

    There is one for each delta, and the perturbed pass runs on one sample of it at
    least. With a `perturbed_fraction` below 1, the samples on which it does not run
    are groups of their own, unless `keep_whole`.

    With a batch size that is known there are no empty groups. With one that is a
    tensor, a group that would be empty borrows a sample of another, with a share of
    0, because the mean over no samples is not a number.
    """
    is_known = isinstance(batch_size, int)
    if is_known and batch_size == 0:
        raise ValueError(
            "A batch must hold at least one sample. Received: a batch of 0 samples. "
            "Leave it out."
        )
    minimum, maximum = (min, max) if is_known else (ops.minimum, ops.maximum)
    num_deltas = min(num_perturbations, batch_size) if is_known else num_perturbations
    spans: list[tuple[int, Any, Any, Any]] = []
    for i in range(num_deltas):
        start, stop = i * batch_size // num_deltas, (i + 1) * batch_size // num_deltas
        if perturbed_fraction == 1:
            spans.append((i, start, stop, None))
            continue
        rounded = _rounded_product(perturbed_fraction, stop - start)
        num_perturbed = minimum(stop - start, maximum(rounded, 1))
        if keep_whole:
            spans.append((i, start, stop, num_perturbed))
        else:
            middle = start + num_perturbed
            spans += [(i, start, middle, None), (i, middle, stop, 0)]
    counts = [stop - start if num is None else num for _, start, stop, num in spans]
    groups = []
    for (number, start, stop, num_perturbed), count in zip(spans, counts, strict=True):
        size = stop - start
        if is_known and size == 0:
            continue
        group = Group(
            number,
            start,
            stop,
            num_perturbed,
            size,
            share=_ratio(size, batch_size),
            scale=_ratio(batch_size, maximum(size, 1)),
            perturbed_share=_ratio(count, sum(counts)),
            perturbed_scale=_ratio(batch_size, maximum(count, 1)),
        )
        if not is_known and len(spans) > 1:
            start = minimum(start, batch_size - 1)
            group = group._replace(start=start, stop=maximum(stop, start + 1))
            if num_perturbed is not None and group.is_perturbed:
                group = group._replace(num_perturbed=maximum(num_perturbed, 1))
        groups.append(group)
    return groups


def _rounded_product(fraction: float, size: Any) -> Any:
    if isinstance(size, int):
        return math.floor(fraction * size + 0.5)
    product = fraction * ops.cast(size, "float32") + 0.5
    return ops.cast(ops.floor(product), size.dtype)


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
    perturbed_shares = [group.perturbed_share for group in groups]
    terms, penalties, y_preds, masks, states = zip(*outcomes, strict=True)
    _, losses, divergences, perturbed_losses = zip(*terms, strict=True)
    loss = mean(losses, shares)
    return Outcome(
        Terms(
            loss,
            loss,
            mean(divergences, perturbed_shares),
            mean(perturbed_losses, perturbed_shares),
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


def samples(batch: Any, start: Any, stop: Any) -> Any:
    """The samples from `start` to `stop`."""
    return tree.map_structure(lambda t: None if t is None else t[start:stop], batch)


def reordered(batch: Any, order: Tensor) -> Any:
    """The samples in the order of these indices."""
    return tree.map_structure(
        lambda t: None if t is None else ops.take(t, order, axis=0), batch
    )


def num_samples(data: Any) -> Any:
    """The number of samples in a batch: an int where it is known."""
    return ops.shape(next(i for i in tree.flatten(data) if i is not None))[0]
