"""Inputs of a step, and the outcomes of its passes on groups and on a batch."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_nrs.keras_internals import set_keras_mask
from keras_nrs.stateless import Update
from keras_nrs.step.groups import Coverage
from keras_nrs.step.groups import Group
from keras_nrs.step.groups import reordered
from keras_nrs.step.groups import samples
from keras_nrs.step.objective import Terms

Tensor = Any


class StepInputs(NamedTuple):
    """The inputs of the objective on the batch of one replica, besides the weights.

    Attributes:
        state: Values of the base model's non-trainable variables, the same for all
            replicas.
        metrics: Values of its metrics' variables.
        batch: The data, as Keras gives it to `train_step()`.
        eps: Size of the neighborhood.
        alpha: Weight of the divergence.
        key: The draw of the perturbations' `SeedGenerator` at this step.
        replica: Index of the replica.
        num_replicas: Number of replicas that share the batch of the step, if this is
            the batch of one of them.
        loss_scale: The factor by which the optimizer scales the loss.
    """

    state: list[Tensor]
    metrics: list[Tensor]
    batch: Any
    eps: Tensor
    alpha: Tensor
    key: Tensor
    replica: Any = 0
    num_replicas: int = 1
    loss_scale: Any = 1.0


class Microbatch(NamedTuple):
    """The inputs of one group.

    Attributes:
        group: Its place in the batch.
        data: Its samples.
        perturbed_data: Its samples on which the perturbed pass runs.
        stream: Index of its delta among the deltas of all replicas.
        state: The state of the base model, with random seeds of its own.
        offsets: The addition to each seed that makes it the group's own, `None` for
            other variables.
        gradients: The gradient at theta of the loss of `perturbed_data`, `None` where
            no delta depends on it.
        clean: The pass at theta, if it has been run for `gradients`.
    """

    group: Group
    data: Any
    perturbed_data: Any
    stream: Any
    state: list[Tensor]
    offsets: list[Tensor | None]
    gradients: list[Tensor] | None = None
    clean: "CleanPass | None" = None


class CleanPass(NamedTuple):
    """The first pass on one group, or on a batch.

    It is at theta, but for `scheme="rpr"` without a clean pass at theta + delta.

    Attributes:
        y_pred: The outputs.
        masks: The Keras masks of `y_pred`, `None` for outputs without one.
        layer_losses: The losses that layers added, without weight penalties.
        state: New values of the base model's non-trainable variables. A variable that
            did not change keeps the given tensor itself.
        updates: The assignments to other variables: pairs of a variable and a value.
    """

    y_pred: Any
    masks: Any
    layer_losses: list[Tensor]
    state: list[Tensor]
    updates: list[Update]


class PerturbedPass(NamedTuple):
    """A pass at theta + delta or theta - delta: outputs, and losses of layers."""

    y_pred: Any
    layer_losses: list[Tensor]


class Passes(NamedTuple):
    """All passes on a batch: the groups' outputs, joined in the order of its samples.

    Attributes:
        clean: The first pass.
        compared: The outputs at theta, which pass no gradient for samples without a
            perturbed pass.
        perturbed: For each pass that follows the first one its outputs, `None` in a
            step without a perturbation. Samples without that pass have the outputs at
            theta here.
        perturbed_losses: The losses that layers added in each of them.
        perturbed_share: The share of samples with that pass, `None` for all.
        gradients: Those on which the first group's delta depends, if any.
    """

    clean: CleanPass
    compared: Any = None
    perturbed: list[Any] | None = None
    perturbed_losses: Sequence[list[Tensor]] = ()
    perturbed_share: Any = None
    gradients: list[Tensor] | None = None

    def set_masks(self) -> None:
        """Let all outputs carry the masks of the first pass."""
        with_masks(self.clean.y_pred, self.clean.masks)
        if self.perturbed:
            for outputs in (self.compared, *self.perturbed):
                with_masks(outputs, self.clean.masks)


class Outcome(NamedTuple):
    """The outcome of a step on a batch.

    Attributes:
        terms: The terms of Equation 3, reduced over the batch as the loss is.
        mean_divergence: The mean of the divergence over the batch, for logs.
        y_pred: As in `CleanPass`.
        masks: As in `CleanPass`.
        state: As in `CleanPass`.
        updates: As in `CleanPass`.
        layer_losses: The losses of layers in the first pass, and weight penalties.
    """

    terms: Terms
    mean_divergence: Tensor
    y_pred: Any
    masks: Any
    state: list[Tensor]
    updates: list[Update]
    layer_losses: list[Tensor]


def joined_passes(
    cleans: Sequence[CleanPass],
    perturbed: Sequence[Sequence[PerturbedPass | None]] | None,
    groups: Sequence[Group],
    *,
    order: Tensor | None = None,
    perturbed_share: Any = None,
    num_replicas: int = 1,
    are_sums: Sequence[bool] = (),
) -> Passes:
    """All passes on a batch, from those on its groups.

    Floats of the state are means over the samples, and so are the losses of layers but
    those that are sums: of these, the mean over the replicas is the sum.

    Args:
        cleans: The first pass on each group.
        perturbed: For each pass that follows the first one, that pass on each group;
            `None` for a group without it. `None` in a step without a perturbation.
        groups: The groups.
        order: The order in which the groups take the samples, `None` for their own.
        perturbed_share: As in `Passes`.
        num_replicas: As in `StepInputs`.
        are_sums: Whether each loss of layers is a sum over samples. If empty, none is.
    """
    y_preds, masks, losses, states, updates = zip(*cleans, strict=True)
    shares = [group.share for group in groups]
    if len(groups) > 1 or num_replicas > 1:
        _check_has_samples(y_preds[0])

    def of_batch(structures: Sequence[Any]) -> Any:
        joined = structures[0]
        if len(structures) > 1:
            joined = tree.map_structure(_concatenated, *structures)
        return joined if order is None else reordered(joined, ops.argsort(order))

    counted = list(map(_counted, y_preds, groups))
    clean = CleanPass(
        of_batch(counted),
        of_batch(list(map(_counted, masks, groups))),
        _over_groups(losses, shares, are_sums, num_replicas),
        [_weighted_sum(values, shares) for values in zip(*states, strict=True)],
        updates[-1],
    )
    if perturbed is None:
        return Passes(clean)
    compared: Any = None
    outputs, perturbed_losses = [], []
    for of_pass in perturbed:
        of_groups = [
            _in_both_passes(y_pred, passed, group)
            for y_pred, passed, group in zip(counted, of_pass, groups, strict=True)
        ]
        compared, joined = map(of_batch, zip(*of_groups, strict=True))
        outputs.append(joined)
        pairs = [(p, g) for p, g in zip(of_pass, groups, strict=True) if p is not None]
        losses_of_pass = _over_groups(
            [passed.layer_losses for passed, _ in pairs],
            [group.perturbed_share for _, group in pairs],
            are_sums,
            num_replicas if perturbed_share is None else num_replicas / perturbed_share,
        )
        perturbed_losses.append(losses_of_pass)
    return Passes(clean, compared, outputs, perturbed_losses, perturbed_share)


def _check_has_samples(outputs: Any) -> None:
    """Raise an error for an output that cannot be put together from shares."""
    tensors = [output for output in tree.flatten(outputs) if output is not None]
    if any(tuple(tensor.shape) == () for tensor in tensors):
        raise ValueError(
            "Outputs must have an axis of samples for perturbations_per_replica > 1, "
            "perturbed_fraction < 1 and several devices. Received: a scalar output. "
            "Leave out these options, or call self.add_loss() in call() if it is a "
            "part of the loss."
        )


def _concatenated(*tensors: Tensor) -> Tensor:
    return None if tensors[0] is None else ops.concatenate(tensors, axis=0)


def _counted(outputs: Any, group: Group) -> Any:
    """The outputs of samples that count: an empty group borrows another's sample."""
    if isinstance(group.size, int):
        return outputs
    return samples(outputs, 0, group.size)


def _in_both_passes(
    y_pred: Any, perturbed: PerturbedPass | None, group: Group
) -> tuple[Any, Any]:
    """The outputs of a group at theta and at theta + delta, for its divergence."""
    if perturbed is not None and group.coverage is Coverage.ALL:
        return y_pred, _counted(perturbed.y_pred, group)
    fixed = tree.map_structure(ops.stop_gradient, y_pred)
    if perturbed is None:
        return fixed, fixed
    num = group.num_perturbed
    if not isinstance(num, int):
        num = ops.minimum(num, group.size)
    rest = samples(fixed, num, None)
    return (
        tree.map_structure(_concatenated, samples(y_pred, 0, num), rest),
        tree.map_structure(_concatenated, samples(perturbed.y_pred, 0, num), rest),
    )


def _over_groups(
    losses: Sequence[list[Tensor]],
    shares: Sequence[Any],
    are_sums: Sequence[bool],
    factor: Any,
) -> list[Tensor]:
    """The losses of layers on a batch: means over groups, or sums times a factor."""
    return [
        factor * sum(map(_if_counted, values, shares))
        if is_sum
        else _weighted_sum(values, shares)
        for is_sum, *values in zip(
            are_sums or [False] * len(losses[0]), *losses, strict=True
        )
    ]


def _if_counted(loss: Tensor, share: Any) -> Tensor:
    """The loss of a group, 0 for an empty one: it borrows another's sample."""
    if isinstance(share, float):
        return loss
    return ops.where(share > 0, loss, ops.zeros_like(loss))


def _weighted_sum(tensors: Sequence[Tensor], shares: Sequence[Any]) -> Tensor:
    """The sum of float tensors times their shares; of others the first."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = keras.backend.standardize_dtype(tensors[0].dtype)
    is_float = keras.backend.is_float_dtype(dtype)
    if not is_float or all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return sum(
        ops.cast(share, tensor.dtype) * tensor
        for share, tensor in zip(shares, tensors, strict=True)
    )


def with_mean_gradients(microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """The groups, all with the mean of their gradients over the perturbed samples."""
    perturbed = [m for m in microbatches if m.gradients is not None]
    shares = [m.group.perturbed_share for m in perturbed]
    of_groups = [m.gradients or [] for m in perturbed]
    mean = [_weighted_sum(of_each, shares) for of_each in zip(*of_groups, strict=True)]
    return [
        m if m.gradients is None else m._replace(gradients=mean) for m in microbatches
    ]


def with_masks(outputs: Any, masks: Any) -> Any:
    """The outputs, carrying these Keras masks."""

    def with_mask(output: Tensor, mask: Tensor) -> Tensor:
        if mask is not None:
            set_keras_mask(output, mask)
        return output

    return tree.map_structure(with_mask, outputs, masks)
