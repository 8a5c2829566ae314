"""Equation 3 on a batch: the part of a training step that all backends share."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
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
from keras_nrs.step.groups import Coverage
from keras_nrs.step.groups import num_samples
from keras_nrs.step.groups import reordered
from keras_nrs.step.groups import samples
from keras_nrs.step.groups import split_into_groups
from keras_nrs.step.objective import Terms
from keras_nrs.step.objective import combine
from keras_nrs.step.options import StepOptions
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Microbatch
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import PassesOutcome
from keras_nrs.step.outcomes import PerturbedPass
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import mean_over_groups
from keras_nrs.step.outcomes import with_masks
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import copied_weights
from keras_nrs.step.output_divergences import total_divergence

Tensor = Any
# From weights to the outputs of a pass.
Pass = Callable[[list[Tensor]], Any]

# Keeps the dropout seeds of groups far apart: seeds count up by 1 at every draw.
SEED_STRIDE = 888_888_877
# Apart from the streams of the deltas, which are counted from 0.
_ORDER_STREAM = 1_000_000_007


class SplitBatch(NamedTuple):
    """A batch as its groups, and the order in which they take its samples if any."""

    microbatches: list[Microbatch]
    order: Tensor | None


class BatchObjective:
    """Equation 3 on the batch of one replica, differentiable in the weights.

    Nothing is assigned. `split()` makes `perturbations_per_replica` groups of the
    batch, each with a delta, dropout masks and batch moments of its own: a replica with
    two groups computes what two replicas would. Samples without a perturbed pass are
    groups too, so that both passes have the same masks and moments in the others.

    A step has two phases, the passes at theta + delta (`perturbed_outputs()`) and the
    passes at theta with all terms (`outcome()`). Each is a function of the weights that
    a trainer may differentiate on its own. A direction that depends on the gradient at
    theta can be drawn from `clean_pass()` before either.

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

    def needs_perturbed_pass(self, alpha: keras.Variable) -> bool:
        """Whether anything of the perturbed pass is minimized."""
        base, options = self.base_model, self.options
        if base.built and not base.trainable_variables:
            return False
        if options.scheme == "nrs" and options.beta == 0:
            return float(ops.convert_to_numpy(alpha)) > 0
        return options.scheme != "baseline"

    @not_in_graphs
    def build(self, data: Any) -> None:
        """Build the unbuilt parts of the base model and of its compiled loss."""
        base = self.base_model
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        outputs = getattr(base, "outputs", None)
        if isinstance(base, keras_internals.Functional):
            outputs = base.output
        with naming_labels(y, outputs, sample_weight):
            keras_internals.build_for_batch(base, data)

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
            stream = group.number if self.options.sync_perturbation else index
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
        return SplitBatch(microbatches, order)

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
        with restored_random_state(inputs.key):
            for microbatch in batch.microbatches:
                if not microbatch.group.is_perturbed:
                    outputs.append(None)
                    continue

                def run(weights: list[Tensor], microbatch: Any = microbatch) -> Any:
                    deltas = self.draw(weights, inputs, microbatch)
                    return self._perturbed_pass(weights, deltas, inputs, microbatch)

                outputs.append(recompute(run, weights) if recompute else run(weights))
        return outputs

    @not_in_graphs
    def draw(
        self, weights: list[Tensor], inputs: StepInputs, microbatch: Microbatch
    ) -> list[Tensor | None]:
        """delta for one group: a constant, `None` for variables without one."""
        return perturbations.sample_deltas(
            self.options.perturbation,
            self.base_model.trainable_variables,
            [ops.stop_gradient(w) for w in weights],
            inputs.eps,
            RandomStream(inputs.key).fold_in(microbatch.stream),
        )

    def _perturbed_pass(
        self,
        weights: list[Tensor],
        deltas: list[Tensor | None],
        inputs: StepInputs,
        microbatch: Microbatch,
    ) -> PerturbedPass:
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch.perturbed_data)
        if self.options.scheme == "nrs":
            # Gradients of float8's scales are their new values: the clean pass's count.
            weights = [
                ops.stop_gradient(w) if v.overwrite_with_gradient else w
                for v, w in zip(base.trainable_variables, weights, strict=True)
            ]
        values = perturbations.add_deltas(weights, deltas)
        with stateless.scope(base, values, microbatch.state, inputs.metrics) as scope:
            y_pred = base(x, **stateless.call_kwargs(base, training=True))
        return PerturbedPass(y_pred, list(scope.losses))

    # The phase at theta.

    def outcome(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        perturbed_outputs: list[PerturbedPass | None] | None,
    ) -> Outcome:
        """The terms and outputs of a step, differentiable in weights and outputs.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: The other inputs of the step.
            batch: The batch of `inputs`, split.
            perturbed_outputs: The outputs of `perturbed_outputs()`. `None` for a step
                without a perturbed pass, whose total is L(theta).
        """
        microbatches, order = batch
        outputs = perturbed_outputs or [None] * len(microbatches)
        # In the order of the perturbed passes, and then the others: a global generator
        # of random numbers must give a group the same masks in both passes.
        indices = sorted(
            range(len(microbatches)),
            key=lambda i: not microbatches[i].group.is_perturbed,
        )
        outcomes: dict[int, PassesOutcome] = {}
        for i in indices:
            outcomes[i] = self._passes_outcome(
                weights, inputs, microbatches[i], outputs[i]
            )
            # Metrics that layers update count on from group to group.
            updated = {id(v): value for v, value in outcomes[i].clean.updates}
            metrics = zip(
                self.base_model.metrics_variables, inputs.metrics, strict=True
            )
            inputs = inputs._replace(
                metrics=[updated.get(id(v), value) for v, value in metrics]
            )
        clean, divergence, perturbed_loss = mean_over_groups(
            [outcomes[i] for i in range(len(microbatches))],
            [microbatch.group for microbatch in microbatches],
        )
        y_pred, masks = clean.y_pred, clean.masks
        if order is not None:
            y_pred, masks = reordered((y_pred, masks), ops.argsort(order))
        terms = Terms(clean.loss, clean.loss, divergence, perturbed_loss)
        if perturbed_outputs is not None:
            terms = combine(
                clean.loss,
                divergence,
                perturbed_loss,
                alpha=ops.cast(inputs.alpha, clean.loss.dtype),
                beta=self.options.beta,
                scheme=self.options.scheme,
                normalize=self.options.normalize,
                penalty=clean.penalty,
            )
        return Outcome(
            terms, y_pred, masks, clean.state, clean.updates, clean.layer_losses
        )

    def clean_pass(
        self, weights: list[Tensor], inputs: StepInputs, microbatch: Microbatch
    ) -> CleanPass:
        """The pass at theta on one group, with L(theta)."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(microbatch.data)
        with stateless.scope(base, weights, microbatch.state, inputs.metrics) as scope:
            before = list(map(scope.get_current_value, base.non_trainable_variables))
            y_pred = base(x, **stateless.call_kwargs(base, training=True))
            layer_losses = base.losses
            batch_losses = set(map(id, scope.losses))
            after = list(map(scope.get_current_value, base.non_trainable_variables))
        # Without the group's offset, so that all groups advance one shared seed.
        state = [
            given if new is old else new if offset is None else new - offset
            for given, old, new, offset in zip(
                inputs.state, before, after, microbatch.offsets, strict=True
            )
        ]
        masks = tree.map_structure(keras_internals.get_keras_mask, y_pred)
        self._check_has_loss(layer_losses)
        with (
            naming_labels(y, y_pred, sample_weight),
            stateless.scope(base, weights, microbatch.state, inputs.metrics),
            stateless.layer_losses(base, layer_losses),
            _sums_times(
                inputs.num_replicas * microbatch.group.scale,
                self._compiled_losses(y_pred),
            ),
        ):
            loss = keras_internals.compute_loss(
                base, x, y, y_pred, copied_weights(sample_weight), training=True
            )
            penalty = sum(
                keras_internals.additional_loss(base, layer_loss)
                for layer_loss in layer_losses
                if id(layer_loss) not in batch_losses
            )
        penalty = ops.convert_to_tensor(penalty, loss.dtype)
        known = set(map(id, base.non_trainable_variables))
        updates = [update for key, update in scope.updates.items() if key not in known]
        return CleanPass(loss, penalty, y_pred, masks, state, updates, layer_losses)

    def _passes_outcome(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        microbatch: Microbatch,
        perturbed: PerturbedPass | None,
    ) -> PassesOutcome:
        """Both passes on a group, given the perturbed one."""
        clean = self.clean_pass(weights, inputs, microbatch)
        divergence = perturbed_loss = ops.zeros((), clean.loss.dtype)
        if perturbed is not None:
            y_pred, masks = clean.y_pred, clean.masks
            if microbatch.group.coverage is Coverage.SOME:
                y_pred, masks = samples(
                    (y_pred, masks), 0, microbatch.group.num_perturbed
                )
            divergence, perturbed_loss = self._perturbed_terms(
                weights,
                inputs,
                microbatch,
                with_masks(y_pred, masks),
                perturbed._replace(y_pred=with_masks(perturbed.y_pred, masks)),
            )
        return PassesOutcome(
            clean, ops.cast(divergence, clean.loss.dtype), perturbed_loss
        )

    def _perturbed_terms(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        microbatch: Microbatch,
        y_pred: Any,
        perturbed: PerturbedPass,
    ) -> tuple[Tensor, Tensor]:
        """The divergence and the perturbed loss of a group."""
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            microbatch.perturbed_data
        )
        resolved = self.divergences.of(base, y_pred, y)
        sums = self._compiled_losses(y_pred)
        sums += [output.divergence for output in resolved]
        factor = inputs.num_replicas * microbatch.group.perturbed_scale
        if self._has_own_loss:
            # It may have weights of its own. The same key draws the same delta.
            deltas = self.draw(weights, inputs, microbatch)
            weights = perturbations.add_deltas(weights, deltas)
        weight, weight_of_divergence = (copied_weights(sample_weight) for _ in range(2))
        with (
            stateless.scope(base, weights, microbatch.state, inputs.metrics),
            stateless.layer_losses(base, perturbed.layer_losses),
            _sums_times(factor, sums),
        ):
            perturbed_loss = keras_internals.compute_loss(
                base, x, y, perturbed.y_pred, weight, training=True
            )
            divergence = total_divergence(
                resolved, y, y_pred, perturbed.y_pred, weight_of_divergence
            )
        return divergence, perturbed_loss

    def _compiled_losses(self, y_pred: Any) -> list[Any]:
        flat = keras_internals.flat_losses(self.base_model, y_pred) or []
        return [loss.loss for loss in flat]

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


@contextmanager
def _sums_times(factor: Any, losses: Sequence[Any]) -> Iterator[None]:
    """Multiply the losses that have `reduction="sum"`.

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
