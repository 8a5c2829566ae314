"""Equation 3 on a batch: what the steps of all backends have in common."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any

import keras
from keras import ops
from keras import tree
from keras.src.backend.common.masking import get_keras_mask

from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs.backend import RandomStream
from keras_nrs.labels import naming_labels
from keras_nrs.step import output_divergences
from keras_nrs.step.groups import Outcome
from keras_nrs.step.groups import Part
from keras_nrs.step.groups import StepInputs
from keras_nrs.step.groups import mean_outcome
from keras_nrs.step.groups import num_samples
from keras_nrs.step.groups import reordered
from keras_nrs.step.groups import samples
from keras_nrs.step.groups import split_into_groups
from keras_nrs.step.groups import with_masks
from keras_nrs.step.objective import Terms
from keras_nrs.step.objective import combine

Tensor = Any

# Keeps the dropout seeds of groups far apart: seeds count up by 1 at every draw.
_SEED_STRIDE = 888_888_877
# Apart from the streams of the deltas, which are counted from 0.
_ORDER_STREAM = 1_000_000_007


@contextmanager
def _sums_times(factor: Any, losses: Sequence[Any]) -> Iterator[None]:
    """Multiply those of some losses that have `reduction="sum"`.

    Terms are averaged over groups, and the sum over a batch is the mean of `factor`
    times the sums over its groups.
    """
    is_one = isinstance(factor, int | float) and factor == 1
    sums = {id(loss): loss for loss in losses if getattr(loss, "reduction", 0) == "sum"}
    chosen = [] if is_one else list(sums.values())
    for loss in chosen:
        loss.call = lambda *args, call=loss.call: factor * call(*args)
    try:
        yield
    finally:
        for loss in chosen:
            del loss.call


def _plus(tensors: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        tensor if other is None else tensor + other
        for tensor, other in zip(tensors, others, strict=True)
    ]


class TrainingStep:
    """The methods of `NRSModel` of which the backends make their training steps."""

    def divergence_in_use(self: Any) -> tuple[Any, Any]:
        """`divergence` as given, and what it came to for each output, if known yet."""
        self._follow_base_model()
        return self._divergences.given, self._divergences.resolved

    def _perturbed_pass_matters(self: Any) -> bool:
        """Whether anything of the perturbed pass is minimized."""
        base = self.base_model
        if base.built and not base.trainable_variables:
            return False
        if self.scheme == "nrs" and self.beta == 0:
            return float(ops.convert_to_numpy(self.alpha)) > 0
        return self.scheme != "baseline"

    def _parts(self: Any, inputs: StepInputs) -> list[Part]:
        """What each group of the batch is run on."""
        batch, num_deltas = inputs.batch, self.perturbations_per_replica
        if self.perturbed_fraction < 1:
            batch = reordered(batch, self._random_order(inputs))
        groups = split_into_groups(
            num_samples(batch),
            num_deltas,
            self.perturbed_fraction,
            # Dropout and BatchNorm have a state. Without one samples are independent.
            keep_whole=not self.base_model.non_trainable_variables,
        )
        parts = []
        for group in groups:
            data = batch
            if len(groups) > 1:
                data = samples(batch, group.start, group.stop)
            perturbed_data = data
            if group.num_perturbed is not None:
                perturbed_data = samples(data, 0, group.num_perturbed)
            index = inputs.replica * num_deltas + group.number
            stream = group.number if self.sync_perturbation else index
            # Indices of groups on which no perturbed pass runs count down from -1.
            own_index = index if group.is_perturbed else -1 - index
            seeds = self._own_seeds(inputs.state, own_index)
            state = _plus(inputs.state, seeds)
            parts.append(Part(group, data, perturbed_data, stream, state, seeds))
        return parts

    def _random_order(self: Any, inputs: StepInputs) -> Tensor:
        """A permutation of the samples, the first of which are perturbed."""
        stream = RandomStream(inputs.key).fold_in(_ORDER_STREAM + inputs.replica)
        return ops.argsort(stream.uniform((num_samples(inputs.batch),)))

    def _objective(
        self: Any,
        weights: list[Tensor],
        inputs: StepInputs,
        *,
        perturb: bool = True,
        perturbed_outputs: list[Any] | None = None,
    ) -> Outcome:
        """Equation 3 on the batch of one replica, differentiable in `weights`.

        Nothing is assigned. The batch is split into `perturbations_per_replica`
        groups, each with a delta, dropout masks and batch moments of its own: a
        replica with two groups computes what two replicas would. Samples on which no
        perturbed pass runs are groups too, so that in the others both passes have
        the same masks and moments.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: What else it is computed from.
            perturb: Whether there is a perturbed pass. Without it the total is
                L(theta).
            perturbed_outputs: The outputs of the perturbed pass for each group, if
                they are known. `weights` has no influence on them.
        """
        parts = self._parts(inputs)
        if not perturb:
            perturbed_outputs = [None] * len(parts)
        elif perturbed_outputs is None:
            perturbed_outputs = self._perturbed_outputs(weights, inputs, parts)
        # In the order of the perturbed passes, and then the others: a global generator
        # (see `_random_numbers_put_back`) must give a group the same masks again.
        order = sorted(range(len(parts)), key=lambda i: not parts[i].group.is_perturbed)
        outcomes = {
            i: self._outcome_of_group(weights, inputs, parts[i], perturbed_outputs[i])
            for i in order
        }
        outcome = mean_outcome(
            [outcomes[i] for i in range(len(parts))], [part.group for part in parts]
        )
        if self.perturbed_fraction < 1:
            place = ops.argsort(self._random_order(inputs))
            y_pred, masks = reordered((outcome.y_pred, outcome.masks), place)
            outcome = outcome._replace(y_pred=y_pred, masks=masks)
        if not perturb:
            return outcome
        _, loss, divergence, perturbed_loss = outcome.terms
        terms = combine(
            loss,
            divergence,
            perturbed_loss,
            alpha=ops.cast(inputs.alpha, loss.dtype),
            beta=self.beta,
            scheme=self.scheme,
            normalize=self.normalize,
            penalty=outcome.penalty,
        )
        return outcome._replace(terms=terms)

    def _perturbed_outputs(
        self: Any, weights: list[Tensor], inputs: StepInputs, parts: Sequence[Part]
    ) -> list[Any]:
        """f(x; theta + delta) for each group, `None` where that is not needed."""
        with self._random_numbers_put_back():
            return [
                self._perturbed_pass(weights, inputs, part)
                if part.group.is_perturbed
                else None
                for part in parts
            ]

    def _perturbed_pass(
        self: Any, weights: list[Tensor], inputs: StepInputs, part: Part
    ) -> Any:
        """f(x; theta + delta) for one group, differentiable in `weights`."""
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(part.perturbed_data)
        perturbed_weights = self._perturbed(weights, inputs, part)
        with stateless.scope(base, perturbed_weights, part.state, inputs.metrics):
            return base(x, **stateless.call_kwargs(base, training=True))

    def _outcome_of_group(
        self: Any,
        weights: list[Tensor],
        inputs: StepInputs,
        part: Part,
        perturbed: Any,
    ) -> Outcome:
        """What is known of a group, given the outputs of its perturbed pass."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part.data)
        with stateless.scope(base, weights, part.state, inputs.metrics) as scope:
            before = list(map(scope.get_current_value, base.non_trainable_variables))
            y_pred = base(x, **stateless.call_kwargs(base, training=True))
            layer_losses = base.losses
            after = list(map(scope.get_current_value, base.non_trainable_variables))
        # Seeds count on from those that all groups share.
        state = [
            given if new is old else new if seed is None else new - seed
            for given, old, new, seed in zip(
                inputs.state, before, after, part.seeds, strict=True
            )
        ]
        masks = tree.map_structure(get_keras_mask, y_pred)
        compiled = [
            loss.loss for loss in output_divergences.flat_losses(base, y_pred) or []
        ]
        factor = inputs.num_replicas * part.group.scale
        # Copied for each use: on PyTorch, Keras multiplies masks into it in place.
        weight = output_divergences.copied(sample_weight)
        self._check_has_loss(layer_losses)
        with (
            naming_labels(y, y_pred, sample_weight),
            stateless.scope(base, weights, part.state, inputs.metrics),
            stateless.layer_losses(base, layer_losses),
            _sums_times(factor, compiled),
        ):
            loss = base._compute_loss(x, y, y_pred, weight, training=True)
            penalty = sum(map(base._aggregate_additional_loss, layer_losses))
        divergence = perturbed_loss = ops.zeros((), loss.dtype)
        if perturbed is not None:
            of_perturbed, masks_of_perturbed = y_pred, masks
            if part.group.num_perturbed is not None:
                of_perturbed, masks_of_perturbed = samples(
                    (y_pred, masks), 0, part.group.num_perturbed
                )
            divergence, perturbed_loss = self._perturbed_terms(
                weights,
                inputs,
                part,
                with_masks(of_perturbed, masks_of_perturbed),
                with_masks(perturbed, masks_of_perturbed),
            )
        terms = Terms(loss, loss, ops.cast(divergence, loss.dtype), perturbed_loss)
        penalty = ops.convert_to_tensor(penalty, loss.dtype)
        return Outcome(terms, penalty, y_pred, masks, state)

    def _perturbed_terms(
        self: Any,
        weights: list[Tensor],
        inputs: StepInputs,
        part: Part,
        y_pred: Any,
        perturbed: Any,
    ) -> tuple[Tensor, Tensor]:
        """The divergence and the perturbed loss of a group."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part.perturbed_data)
        weight, weight_of_divergence = (
            output_divergences.copied(sample_weight) for _ in range(2)
        )
        compiled = [
            loss.loss for loss in output_divergences.flat_losses(base, y_pred) or []
        ]
        resolved = self._resolved_divergences(y_pred, y)
        sums = compiled + [output.divergence for output in resolved]
        with (
            stateless.scope(base, weights, part.state, inputs.metrics),
            stateless.layer_losses(base, []),
            _sums_times(inputs.num_replicas * part.group.perturbed_scale, sums),
        ):
            perturbed_loss = base._compute_loss(x, y, perturbed, weight, training=True)
            divergence = output_divergences.total_divergence(
                resolved, y, y_pred, perturbed, weight_of_divergence
            )
        return divergence, perturbed_loss

    def _perturbed(
        self: Any, weights: list[Tensor], inputs: StepInputs, part: Part
    ) -> list[Tensor]:
        """theta + delta for one group, where delta is a constant."""
        deltas = perturbations.sample_deltas(
            self.perturbation,
            self.base_model.trainable_variables,
            [ops.stop_gradient(w) for w in weights],
            inputs.eps,
            RandomStream(inputs.key).fold_in(part.stream),
        )
        return perturbations.add_deltas(weights, deltas)

    def _random_numbers_put_back(self: Any) -> AbstractContextManager[None]:
        """A context in which the random numbers are those that come after it.

        Those of `SeedGenerator`s are part of the state. A backend with a global
        generator has more to put back.
        """
        return nullcontext()

    def _own_seeds(self: Any, state: list[Tensor], index: Any) -> list[Tensor | None]:
        """What to add to the state of each `SeedGenerator`, `None` elsewhere.

        All replicas hold the same seeds. Without this, dropout would drop the same
        elements in all groups.
        """
        if isinstance(index, int) and index == 0:
            return [None] * len(state)
        base = self.base_model
        weights = set(map(id, base.weights))
        stride = ops.convert_to_tensor([_SEED_STRIDE, 0], "int32")
        return [
            None if id(v) in weights else ops.cast(index * stride, s.dtype)
            for v, s in zip(base.non_trainable_variables, state, strict=True)
        ]

    def _resolved_divergences(
        self: Any, outputs: Any, y: Any
    ) -> list[output_divergences.OutputDivergence]:
        if self._divergences.resolved is None:
            self._divergences.resolved = output_divergences.for_model(
                self.base_model, self._divergences.given, outputs, y
            )
        return self._divergences.resolved

    def _has_own_loss(self: Any) -> bool:
        """Whether the base model overrides `compute_loss()`."""
        return type(self.base_model).compute_loss is not keras.Model.compute_loss

    def _check_has_loss(self: Any, layer_losses: Sequence[Any]) -> None:
        """Raise an error where Keras, on JAX, takes 0 for the loss."""
        base = self.base_model
        if base._compile_loss is None and not layer_losses and not self._has_own_loss():
            raise ValueError(
                "`model` must have a loss. Received: a model named "
                f"{base.name!r} that is compiled without one and adds none. Call "
                "compile(loss=...)."
            )

    def _loss_updates_metrics(self: Any) -> bool:
        """Whether `compute_loss()` may update metrics.

        That of several outputs does, and that of a subclass may.
        """
        compiled = self.base_model._compile_loss
        return self._has_own_loss() or bool(compiled and compiled.metrics)

    def _symbolic_build_of_base(self: Any, data: Any) -> None:
        """Build what is not built yet of the base model and of its compiled loss."""
        base = self.base_model
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with naming_labels(y, getattr(base, "outputs", None), sample_weight):
            base._symbolic_build(data_batch=data)

    def _assign_outcome(
        self: Any,
        outcome: Outcome,
        data: Any,
        *,
        weight: Any = 1,
        unscaled: Callable[[Tensor], Tensor] = lambda term: term,
    ) -> dict[str, Tensor]:
        """Update the model's state and metrics in place, and give the logs."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        variables = base.non_trainable_variables
        for variable, value in zip(variables, outcome.state, strict=True):
            if value is not variable.value:
                variable.assign(value)
        terms = Terms(*map(unscaled, outcome.terms))
        y_pred = with_masks(outcome.y_pred, outcome.masks)
        if self._loss_updates_metrics():
            weight_of_loss = output_divergences.copied(sample_weight)
            base._compute_loss(x, y, y_pred, weight_of_loss, training=True)
        base._loss_tracker.update_state(terms.total, sample_weight=num_samples(x))
        self._update_trackers(terms, data, weight=weight)
        logs: dict[str, Tensor] = base.compute_metrics(
            x, y, y_pred, sample_weight=sample_weight
        )
        return logs | self._tracker_logs()

    def _update_trackers(
        self: Any, terms: Terms, data: Any, *, weight: Any = 1
    ) -> None:
        samples = num_samples(data) * weight
        divergence, perturbed_loss = self._trackers
        divergence.update_state(terms.divergence, sample_weight=samples)
        perturbed_loss.update_state(terms.perturbed_loss, sample_weight=samples)

    def _tracker_logs(self: Any) -> dict[str, Tensor]:
        return {tracker.name: tracker.result() for tracker in self._trackers}
