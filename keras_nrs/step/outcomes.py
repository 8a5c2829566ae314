"""Inputs of a step, and the outcomes of its passes on groups and on a batch."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_nrs.keras_internals import set_keras_mask
from keras_nrs.step.groups import Group
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
        num_replicas: Number of replicas over which the caller averages the terms.
    """

    state: list[Tensor]
    metrics: list[Tensor]
    batch: Any
    eps: Tensor
    alpha: Tensor
    key: Tensor
    replica: Any = 0
    num_replicas: int = 1


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
    """

    group: Group
    data: Any
    perturbed_data: Any
    stream: Any
    state: list[Tensor]
    offsets: list[Tensor | None]


class CleanPass(NamedTuple):
    """The pass at theta on one group.

    Attributes:
        loss: L(theta), with the losses of layers.
        penalty: The part of `loss` that depends on the weights alone.
        y_pred: The outputs.
        masks: The Keras masks of `y_pred`, `None` for outputs without one.
        state: New values of the base model's non-trainable variables. A variable that
            did not change keeps the given tensor itself.
        updates: The assignments to other variables: pairs of a variable and a value.
        layer_losses: The losses of layers, penalties too.
    """

    loss: Tensor
    penalty: Tensor
    y_pred: Any
    masks: Any
    state: list[Tensor]
    updates: list[tuple[keras.Variable, Tensor]]
    layer_losses: list[Tensor]


class PerturbedPass(NamedTuple):
    """The pass at theta + delta on one group: its outputs, and the losses of layers.

    Weight penalties are not among the losses: they count once, at theta.
    """

    y_pred: Any
    layer_losses: list[Tensor]


class PassesOutcome(NamedTuple):
    """Both passes on one group, or the means over all groups of a batch."""

    clean: CleanPass
    divergence: Tensor
    perturbed_loss: Tensor


class Outcome(NamedTuple):
    """The outcome of a step on a batch: `CleanPass` describes all but the terms."""

    terms: Terms
    y_pred: Any
    masks: Any
    state: list[Tensor]
    updates: list[tuple[keras.Variable, Tensor]]
    layer_losses: list[Tensor]


def mean_over_groups(
    outcomes: Sequence[PassesOutcome], groups: Sequence[Group]
) -> PassesOutcome:
    """The outcome of a batch from the outcomes of its groups.

    The loss is the mean over all samples; divergence and perturbed loss are means over
    the samples with a perturbed pass. Outputs and masks are joined. Of assignments to
    other variables the last group's are kept.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    shares = [group.share for group in groups]
    perturbed_shares = [group.perturbed_share for group in groups]
    cleans, divergences, perturbed_losses = zip(*outcomes, strict=True)
    losses, penalties, y_preds, masks, states, updates, layer_losses = zip(
        *cleans, strict=True
    )

    def joined(*tensors: Tensor) -> Tensor:
        if tensors[0] is None:
            return None
        parts = [t[: group.size] for group, t in zip(groups, tensors, strict=True)]
        return ops.concatenate(parts, axis=0)

    return PassesOutcome(
        CleanPass(
            _weighted_sum(losses, shares),
            _weighted_sum(penalties, shares),
            tree.map_structure(joined, *y_preds),
            tree.map_structure(joined, *masks),
            [_weighted_sum(values, shares) for values in zip(*states, strict=True)],
            updates[-1],
            [_weighted_sum(one, shares) for one in zip(*layer_losses, strict=True)],
        ),
        _weighted_sum(divergences, perturbed_shares),
        _weighted_sum(perturbed_losses, perturbed_shares),
    )


def _weighted_sum(tensors: Sequence[Tensor], shares: Sequence[Any]) -> Tensor:
    """The sum of float tensors times their shares; of others the first."""
    dtype = keras.backend.standardize_dtype(tensors[0].dtype)
    is_float = keras.backend.is_float_dtype(dtype)
    if not is_float or all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return sum(
        ops.cast(share, tensor.dtype) * tensor
        for share, tensor in zip(shares, tensors, strict=True)
    )


def with_masks(outputs: Any, masks: Any) -> Any:
    """The outputs, carrying these Keras masks."""

    def with_mask(output: Tensor, mask: Tensor) -> Tensor:
        if mask is not None:
            set_keras_mask(output, mask)
        return output

    return tree.map_structure(with_mask, outputs, masks)
