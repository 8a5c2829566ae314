"""Equation 3 on a batch: the part of a training step that all backends share."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_nrs import keras_internals
from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs.backend import RandomStream
from keras_nrs.backend import not_in_graphs
from keras_nrs.backend import restored_random_state
from keras_nrs.labels import naming_labels
from keras_nrs.stateless import Update
from keras_nrs.step.groups import Coverage
from keras_nrs.step.groups import num_samples
from keras_nrs.step.groups import perturbed_share
from keras_nrs.step.groups import reordered
from keras_nrs.step.groups import samples
from keras_nrs.step.groups import split_into_groups
from keras_nrs.step.host_random import HostRandomState
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state
from keras_nrs.step.objective import Terms
from keras_nrs.step.objective import combine
from keras_nrs.step.options import StepOptions
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Microbatch
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import Passes
from keras_nrs.step.outcomes import PerturbedPass
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import joined_passes
from keras_nrs.step.outcomes import with_masks
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import OutputDivergence
from keras_nrs.step.output_divergences import as_means
from keras_nrs.step.output_divergences import copied_weights
from keras_nrs.step.output_divergences import total_divergence
from keras_nrs.step.sample_dependence import layer_losses_are_sums
from keras_nrs.step.sample_dependence import loss_compares_samples

Tensor = Any
# From weights to the outputs of a pass.
Pass = Callable[[list[Tensor]], Any]

# Keeps the dropout seeds of groups far apart: seeds count up by 1 at every draw.
SEED_STRIDE = 888_888_877
# Apart from the streams of the deltas, which are counted from 0.
_ORDER_STREAM = 1_000_000_007


class SplitBatch(NamedTuple):
    """A batch as its groups.

    Attributes:
        microbatches: The inputs of each group.
        order: The order in which the groups take the samples, `None` for their own.
        perturbed_share: The share of samples with a perturbed pass, `None` for all.
        host_state: The states of Python's and NumPy's generators for both passes.
    """

    microbatches: list[Microbatch]
    order: Tensor | None
    perturbed_share: Any
    host_state: HostRandomState


class BatchObjective:
    """Equation 3 on a batch, differentiable in the weights.

    Nothing is assigned. `split()` makes `perturbations_per_replica` groups of the
    batch, each with a delta, dropout masks and batch moments of its own: a replica with
    two groups computes the outputs that two replicas would. Samples without a perturbed
    pass are groups too, so that both passes have the same masks and moments in the
    others. Losses and divergences see the outputs of all groups together, so that they
    are plain Keras's, however they are masked, weighted and reduced.

    A step has three phases: the passes at theta + delta (`perturbed_outputs()`), the
    passes at theta (`passes()`), and the terms (`outcome()`). Each is a function of the
    weights that a trainer may differentiate on its own. Passes are those of one
    replica; the terms may be those of all replicas' outputs together.

    Args:
        base_model: The user's own model, compiled.
        options: The options of `wrap()`.
        divergences: The divergence of each output.
    """

    def __init__(
        self,
        base_model: keras.Model,
        options: StepOptions,
        divergences: ChosenDivergences,
    ) -> None:
        self.base_model = base_model
        self.options = options
        self.divergences = divergences

    def needs_perturbed_pass(self, alpha: keras.Variable | None) -> bool:
        """Whether anything of the perturbed pass is minimized.

        `alpha` is `None` where a schedule gives it, which may be 0 in some steps.
        """
        base, options = self.base_model, self.options
        if base.built and not base.trainable_variables:
            return False
        if options.scheme == "nrs" and options.beta == 0:
            return alpha is None or float(ops.convert_to_numpy(alpha)) > 0
        return options.scheme != "baseline"

    @not_in_graphs
    def build(self, data: Any) -> None:
        """Build the unbuilt parts of the base model and of its compiled loss.

        Raises:
            ValueError: if labels do not fit the outputs, or if a layer draws random
                numbers that a second pass cannot repeat.
        """
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        outputs = getattr(base, "outputs", None)
        if isinstance(base, keras_internals.Functional):
            outputs = base.output
        with naming_labels(y, outputs, sample_weight):
            keras_internals.build_for_batch(base, data)
        stateless.check_draws(base, x, training=True)

    def split(self, inputs: StepInputs, *, perturbs: bool = True) -> SplitBatch:
        """The groups of a batch, one if nothing is perturbed, with their inputs."""
        batch, order, num_deltas, fraction = inputs.batch, None, 1, 1.0
        if perturbs:
            num_deltas = self.options.perturbations_per_replica
            fraction = self.options.perturbed_fraction
        if num_deltas > 1 or fraction < 1 or inputs.num_replicas > 1:
            self._check_divisible(batch, is_reordered=fraction < 1)
        if fraction < 1:
            order = self._random_order(inputs)
            batch = reordered(batch, order)
        groups = split_into_groups(
            num_samples(batch),
            num_deltas,
            fraction,
            # Dropout and BatchNorm have a state. Without one samples are independent.
            keep_whole=not self.base_model.non_trainable_variables,
        )
        microbatches = []
        for group in groups:
            data = batch
            if len(groups) > 1:
                data = samples(batch, group.start, group.stop)
            perturbed_data = data
            if group.coverage is not Coverage.ALL:
                perturbed_data = samples(data, 0, group.num_perturbed)
            index = inputs.replica * num_deltas + group.number
            stream = self._stream(inputs, group.number)
            # Indices of groups without a perturbed pass count down from -1.
            own_index = index if group.is_perturbed else -1 - index
            offsets = self._seed_offsets(inputs.state, own_index)
            state = [
                value if offset is None else value + offset
                for value, offset in zip(inputs.state, offsets, strict=True)
            ]
            microbatches.append(
                Microbatch(group, data, perturbed_data, stream, state, offsets)
            )
        share = None
        if fraction < 1:
            share = perturbed_share(groups, num_samples(batch))
        return SplitBatch(microbatches, order, share, host_random_state())

    def _stream(self, inputs: StepInputs, number: int) -> Any:
        """The index of a group's delta among the deltas of all replicas."""
        if self.options.sync_perturbation:
            return number
        return inputs.replica * self.options.perturbations_per_replica + number

    def _check_divisible(self, batch: Any, *, is_reordered: bool) -> None:
        """Raise an error for data and layers that need a batch as a whole."""
        sparse = {"SparseTensor", "BCOO"} if is_reordered else {"SparseTensor"}
        reason = ""
        for tensor in tree.flatten(batch):
            if type(tensor).__name__ in sparse:
                reason = f"sparse data ({type(tensor).__name__}), which has no slices"
        for layer in keras_internals.sublayers(self.base_model, recursive=True):
            if isinstance(layer, keras.layers.RNN) and layer.stateful:
                reason = f"the stateful layer {layer.name!r}, which holds a whole batch"
        if reason:
            raise ValueError(
                "Batches must be divisible for perturbations_per_replica > 1, "
                f"perturbed_fraction < 1 and several devices. Received: {reason}. "
                "Leave out these options, or use dense data and no stateful layers."
            )

    @not_in_graphs
    def _random_order(self, inputs: StepInputs) -> Tensor:
        """A permutation of the samples. The first samples are perturbed."""
        stream = RandomStream(inputs.key).fold_in(_ORDER_STREAM + inputs.replica)
        return ops.argsort(stream.uniform((num_samples(inputs.batch),)))

    def _seed_offsets(self, state: list[Tensor], index: Any) -> list[Tensor | None]:
        """The addition to each `SeedGenerator`'s state in a group, `None` elsewhere.

        All replicas hold the same seeds. Without offsets, dropout would drop the same
        elements in all groups.
        """
        if isinstance(index, int) and index == 0:
            return [None] * len(state)
        base = self.base_model
        weights = set(map(id, base.weights))
        stride = ops.convert_to_tensor([SEED_STRIDE, 0], "int32")
        return [
            None if id(v) in weights else ops.cast(index * stride, s.dtype)
            for v, s in zip(base.non_trainable_variables, state, strict=True)
        ]

    # The phase at theta + delta.

    def perturbed_outputs(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        *,
        recompute: Callable[[Pass, list[Tensor]], Any] | None = None,
    ) -> list[PerturbedPass | None]:
        """The `PerturbedPass` of each group, `None` for a group without that pass.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: The other inputs of the step.
            batch: The batch of `inputs`, split.
            recompute: A function that runs a pass at these weights and keeps no
                activations of it. By default a pass runs as it is.
        """
        outputs: list[PerturbedPass | None] = []
        carried: list[Update] = []
        num_passes = sum(m.group.is_perturbed for m in batch.microbatches)
        with restored_random_state(inputs.key), drawing_from(batch.host_state):
            for microbatch in batch.microbatches:
                if not microbatch.group.is_perturbed:
                    outputs.append(None)
                    continue

                def run(
                    weights: list[Tensor],
                    microbatch: Microbatch = microbatch,
                    carried: list[Update] = carried,
                ) -> Any:
                    deltas = self.draw(weights, inputs, microbatch.stream)
                    values = self._perturbed_weights(
                        self.averaging_overwrites(weights, num_passes), deltas
                    )
                    return self._perturbed_pass(values, inputs, microbatch, carried)

                passed = recompute(run, weights) if recompute else run(weights)
                output, carried = passed
                outputs.append(output)
        return outputs

    @not_in_graphs
    def draw(
        self, weights: list[Tensor], inputs: StepInputs, stream: Any
    ) -> list[Tensor | None]:
        """The delta of a stream: a constant, `None` for variables without one."""
        return perturbations.sample_deltas(
            self.options.perturbation,
            self.base_model,
            [ops.stop_gradient(w) for w in weights],
            inputs.eps,
            RandomStream(inputs.key).fold_in(stream),
        )

    def averaging_overwrites(
        self, weights: list[Tensor], num_passes: int
    ) -> list[Tensor]:
        """The same weights, for each of several passes whose gradients are summed.

        The gradients of float8's scales are their new values. Not their sum but their
        mean over the passes is wanted.
        """
        if num_passes == 1:
            return weights
        variables = self.base_model.trainable_variables
        return [
            ops.stop_gradient(w) + (w - ops.stop_gradient(w)) / num_passes
            if v.overwrite_with_gradient
            else w
            for v, w in zip(variables, weights, strict=True)
        ]

    def _perturbed_weights(
        self, weights: list[Tensor], deltas: list[Tensor | None]
    ) -> list[Tensor]:
        if self.options.scheme == "nrs":
            variables = self.base_model.trainable_variables
            # Gradients of float8's scales are their new values: the clean pass's count.
            weights = [
                ops.stop_gradient(w) if v.overwrite_with_gradient else w
                for v, w in zip(variables, weights, strict=True)
            ]
        return perturbations.add_deltas(weights, deltas)

    def _perturbed_pass(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        microbatch: Microbatch,
        carried: list[Update],
    ) -> tuple[PerturbedPass, list[Update]]:
        """The pass at these weights on one group, and the updates to carry on."""
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch.perturbed_data)
        with self._scope(weights, inputs, microbatch.state, carried) as scope:
            y_pred = stateless.call(base, x, training=True)
            losses = stateless.added_losses(base, scope)
        return PerturbedPass(y_pred, losses), self._carried(carried, scope)

    def _scope(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        state: list[Tensor],
        carried: Sequence[Update] = (),
    ) -> stateless.PassScope:
        return stateless.scope(self.base_model, weights, state, inputs.metrics, carried)

    def _carried(
        self, carried: Sequence[Update], scope: stateless.PassScope
    ) -> list[Update]:
        """The values with which the next group of a batch begins.

        They are those of metrics and of variables that are not the base model's, as of
        a global generator of random numbers: each group goes on with them.
        """
        base = self.base_model
        own = set(map(id, base.trainable_variables + base.non_trainable_variables))
        updates = {id(variable): (variable, value) for variable, value in carried}
        updates |= scope.updates
        return [update for key, update in updates.items() if key not in own]

    # The phase at theta.

    def passes(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        perturbed_outputs: list[PerturbedPass | None] | None,
    ) -> Passes:
        """Both passes on the batch of a replica, given those at theta + delta.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: The other inputs of the step.
            batch: The batch of `inputs`, split.
            perturbed_outputs: The outputs of `perturbed_outputs()`. `None` for a step
                without a perturbed pass.
        """
        microbatches, share = batch.microbatches, batch.perturbed_share
        # In the order of the perturbed passes, and then the others: a global generator
        # of random numbers must give a group the same masks in both passes.
        indices = sorted(
            range(len(microbatches)),
            key=lambda i: not microbatches[i].group.is_perturbed,
        )
        weights = self.averaging_overwrites(weights, len(microbatches))
        cleans: dict[int, CleanPass] = {}
        carried: list[Update] = []
        for i in indices:
            cleans[i], carried = self._clean_pass(
                weights, inputs, microbatches[i], carried
            )
        is_split = len(microbatches) > 1 or share is not None or inputs.num_replicas > 1
        are_sums: list[bool] = []
        if cleans[0].layer_losses and is_split:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(inputs.batch)
            are_sums = layer_losses_are_sums(self.base_model, x)
        return joined_passes(
            [cleans[i] for i in range(len(microbatches))],
            perturbed_outputs,
            [microbatch.group for microbatch in microbatches],
            order=batch.order,
            perturbed_share=share,
            num_replicas=inputs.num_replicas,
            are_sums=are_sums,
        )

    def _clean_pass(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        microbatch: Microbatch,
        carried: list[Update],
    ) -> tuple[CleanPass, list[Update]]:
        """The pass at theta on one group, and the updates to carry on."""
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch.data)
        with self._scope(weights, inputs, microbatch.state, carried) as scope:
            before = list(map(scope.get_current_value, base.non_trainable_variables))
            y_pred = stateless.call(base, x, training=True)
            losses = stateless.added_losses(base, scope)
            after = list(map(scope.get_current_value, base.non_trainable_variables))
        # Without the group's offset, so that all groups advance one shared seed.
        state = [
            given if new is old else new if offset is None else new - offset
            for given, old, new, offset in zip(
                inputs.state, before, after, microbatch.offsets, strict=True
            )
        ]
        masks = tree.map_structure(keras_internals.get_keras_mask, y_pred)
        known = set(map(id, base.non_trainable_variables))
        updates = [update for key, update in scope.updates.items() if key not in known]
        clean = CleanPass(y_pred, masks, losses, state, updates)
        return clean, self._carried(carried, scope)

    # The terms.

    def outcome(
        self, weights: list[Tensor], inputs: StepInputs, passes: Passes
    ) -> Outcome:
        """The terms of a step, differentiable in weights and outputs.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: The other inputs of the step.
            passes: The passes on the batch of `inputs`. Without a perturbed pass the
                total is L(theta).
        """
        base, options, clean = self.base_model, self.options, passes.clean
        passes.set_masks()
        with self._scope(weights, inputs, inputs.state):
            penalties = base.losses
        layer_losses = [*clean.layer_losses, *penalties]
        self._check_has_loss(layer_losses)
        loss = self._loss(weights, inputs, clean.y_pred, layer_losses)
        mean_divergence = ops.zeros((), loss.dtype)
        terms = Terms(loss, loss, mean_divergence, mean_divergence)
        if passes.perturbed is not None:
            penalty = sum(keras_internals.additional_loss(base, p) for p in penalties)
            divergence, mean_divergence = self._divergence_terms(inputs, passes)
            terms = combine(
                loss,
                ops.cast(divergence, loss.dtype),
                self._perturbed_loss(weights, inputs, passes),
                alpha=ops.cast(inputs.alpha, loss.dtype),
                beta=options.beta,
                scheme=options.scheme,
                normalize=options.normalize,
                penalty=ops.convert_to_tensor(penalty, loss.dtype),
            )
        return Outcome(
            terms,
            ops.cast(mean_divergence, loss.dtype),
            clean.y_pred,
            clean.masks,
            clean.state,
            clean.updates,
        )

    def _loss(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        y_pred: Any,
        layer_losses: Sequence[Tensor],
    ) -> Tensor:
        """The loss of a batch with these outputs and these losses of layers."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(inputs.batch)
        with (
            naming_labels(y, y_pred, sample_weight),
            self._scope(weights, inputs, inputs.state),
            stateless.layer_losses(base, layer_losses),
        ):
            return keras_internals.compute_loss(
                base, x, y, y_pred, copied_weights(sample_weight), training=True
            )

    def _perturbed_loss(
        self, weights: list[Tensor], inputs: StepInputs, passes: Passes
    ) -> Tensor:
        """L(theta + delta), or its estimate from a share of the batch.

        The estimate is the loss of the outputs at theta, plus the difference that the
        perturbed outputs make, divided by their share. It has no bias for losses that
        are sums over samples, however these are masked, weighted and divided.
        """
        base, share = self.base_model, passes.perturbed_share
        y_pred, layer_losses = passes.perturbed, passes.perturbed_losses
        if self._has_own_loss:
            # It may have weights of its own. The same key draws the same delta.
            deltas = self.draw(weights, inputs, self._stream(inputs, 0))
            weights = self._perturbed_weights(weights, deltas)
        if share is None:
            return self._loss(weights, inputs, y_pred, layer_losses)
        self._check_is_sum(inputs, y_pred)
        fixed = tree.map_structure(ops.stop_gradient, passes.clean.y_pred)
        fixed = with_masks(fixed, passes.clean.masks)
        at_theta = self._loss(weights, inputs, fixed, [])
        difference = self._loss(weights, inputs, y_pred, []) - at_theta
        added = sum(
            keras_internals.additional_loss(base, loss) for loss in layer_losses
        )
        return at_theta + difference / ops.cast(share, difference.dtype) + added

    def _divergence_terms(
        self, inputs: StepInputs, passes: Passes
    ) -> tuple[Tensor, Tensor]:
        """The divergence of a batch, reduced as the loss is, and its mean."""
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(inputs.batch)
        resolved = self.divergences.of(self.base_model, passes.compared, y)

        def total(divergences: Sequence[OutputDivergence]) -> Tensor:
            value = total_divergence(
                divergences, y, passes.compared, passes.perturbed, sample_weight
            )
            if passes.perturbed_share is None:
                return value
            return value / ops.cast(passes.perturbed_share, value.dtype)

        divergence = total(resolved)
        averaged = as_means(resolved)
        return divergence, divergence if averaged == resolved else total(averaged)

    # The compiled loss of the base model.

    @property
    def loss_updates_metrics(self) -> bool:
        """Whether `compute_loss()` may update metrics.

        It does so for several outputs, and may do so in a subclass.
        """
        compiled = keras_internals.compiled_loss(self.base_model)
        return self._has_own_loss or bool(compiled and compiled.metrics)

    @property
    def _has_own_loss(self) -> bool:
        """Whether the base model overrides `compute_loss()`."""
        return type(self.base_model).compute_loss is not keras.Model.compute_loss

    def _check_is_sum(self, inputs: StepInputs, y_pred: Any) -> None:
        """Raise an error for a loss of which a share of the batch has no part."""
        if loss_compares_samples(self.base_model, inputs.batch, y_pred):
            raise ValueError(
                "`perturbed_fraction` must be 1 with a loss that compares the samples "
                "of a batch: no share of the batch stands for it. Received: "
                f"perturbed_fraction={self.options.perturbed_fraction}, and a loss "
                "that is no sum over samples. Leave out `perturbed_fraction`."
            )

    def _check_has_loss(self, layer_losses: Sequence[Any]) -> None:
        """Raise an error where Keras, on JAX, takes 0 for the loss."""
        base = self.base_model
        compiled = keras_internals.compiled_loss(base)
        if compiled is None and not layer_losses and not self._has_own_loss:
            raise ValueError(
                "`model` must have a loss. Received: a model named "
                f"{base.name!r} that is compiled without one and adds none. Call "
                "compile(loss=...)."
            )
