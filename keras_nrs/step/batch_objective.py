"""Equation 3 on a batch: the part of a training step that all backends share."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import keras
from keras import ops
from keras import tree

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.backend import gradient_with
from keras_nrs.backend import not_in_graphs
from keras_nrs.backend import restored_random_state
from keras_nrs.labels import naming_labels
from keras_nrs.stateless import Update
from keras_nrs.step.groups import Coverage
from keras_nrs.step.groups import samples
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state
from keras_nrs.step.model_passes import ModelPasses
from keras_nrs.step.model_passes import SplitBatch
from keras_nrs.step.objective import Terms
from keras_nrs.step.objective import combine
from keras_nrs.step.options import StepOptions
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Microbatch
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import Passes
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import with_masks
from keras_nrs.step.outcomes import with_mean_gradients
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import OutputDivergence
from keras_nrs.step.output_divergences import as_means
from keras_nrs.step.output_divergences import copied_weights
from keras_nrs.step.output_divergences import total_divergence
from keras_nrs.step.sample_dependence import loss_compares_samples

Tensor = Any
# Plain Keras keeps what layers assign to variables that are not the model's weights.
ASSIGNMENTS_ARE_KEPT = keras.config.backend() != "jax"


class BatchObjective(ModelPasses):
    """Equation 3 on a batch, differentiable in the weights.

    Losses and divergences see the outputs of all groups together, so that they are
    plain Keras's, however they are masked, weighted and reduced.

    A step has three phases, after `with_directions()` where a delta depends on the
    gradient at theta: the passes at theta + delta (`perturbed_outputs()`), the
    passes at theta (`passes()`), and the terms (`outcome()`). Each is a function of the
    weights that a trainer may differentiate on its own. Passes are those of one
    replica; the terms may be those of all replicas' outputs together.

    `scheme="rpr"` without a clean pass has the passes at theta + delta in the place of
    those at theta, and no first phase but that of antithetic deltas.

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
        super().__init__(base_model, options)
        self.divergences = divergences

    def needs_perturbed_pass(self, alpha: keras.Variable | None) -> bool:
        """Whether anything of the perturbed pass is minimized, if there are weights.

        `alpha` is `None` where a schedule gives it, which may be 0 in some steps.
        """
        options = self.options
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
        if self.options.signs:
            with drawing_from(host_random_state()):
                stateless.check_draws(base, x, training=True)

    def with_directions(
        self, weights: list[Tensor], inputs: StepInputs, batch: SplitBatch
    ) -> SplitBatch:
        """The batch with the gradients at theta on which its deltas depend, if any.

        They are constants, of the loss of each group's own samples without weight
        penalties. A scheme that does not differentiate the pass at theta any more keeps
        it for `passes()`.
        """
        options = self.options
        if not options.perturbation.needs_gradients:
            return batch
        weights = list(map(ops.stop_gradient, weights))
        # Each is scaled as a part of the loss of all: where float16 overflows in its
        # gradient, it does in the step's, and the optimizer finds a scale for both.
        num_parts = sum(m.group.is_perturbed for m in batch.microbatches)
        num_parts *= inputs.num_replicas
        inputs = inputs._replace(loss_scale=inputs.loss_scale / num_parts)
        keeps_pass = options.scheme != "nrs"
        microbatches = []
        carried: list[Update] = []
        with ExitStack() as states:
            if not keeps_pass:  # It will be run once more, with the same draws.
                states.enter_context(restored_random_state(inputs.key))
                states.enter_context(drawing_from(batch.host_state))
            for microbatch in batch.microbatches:
                if microbatch.group.is_perturbed:
                    gradients, clean, carried = self._ascent_direction(
                        weights, inputs, microbatch, carried
                    )
                    microbatch = microbatch._replace(
                        gradients=gradients, clean=clean if keeps_pass else None
                    )
                microbatches.append(microbatch)
        if options.sync_perturbation:
            microbatches = with_mean_gradients(microbatches)
        return batch._replace(
            microbatches=microbatches, carried=carried if keeps_pass else ()
        )

    def _ascent_direction(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        microbatch: Microbatch,
        carried: list[Update],
    ) -> tuple[list[Tensor], CleanPass, list[Update]]:
        """The gradient at theta on a group, that pass, and the updates to carry on."""
        data, group = microbatch.perturbed_data, microbatch.group

        def loss(weights: list[Tensor]) -> tuple[Tensor, Any]:
            clean, carried_on = self._clean_pass(weights, inputs, microbatch, carried)
            y_pred = with_masks(clean.y_pred, clean.masks)
            if group.coverage is Coverage.SOME:
                y_pred = with_masks(
                    *samples((clean.y_pred, clean.masks), 0, group.num_perturbed)
                )
            own_inputs = inputs._replace(batch=data)
            with keras_internals.losses_of_one_replica():
                value = self._loss(weights, own_inputs, y_pred, clean.layer_losses)
            if not ASSIGNMENTS_ARE_KEPT:
                clean, carried_on = clean._replace(updates=[]), []
            return value * ops.cast(inputs.loss_scale, value.dtype), (clean, carried_on)

        gradients, (clean, carried) = gradient_with(loss, weights)
        gradients = [_unscaled(g, inputs.loss_scale) for g in gradients]
        y_pred, losses = tree.map_structure(
            ops.stop_gradient, (clean.y_pred, clean.layer_losses)
        )
        return gradients, clean._replace(y_pred=y_pred, layer_losses=losses), carried

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
        base, clean = self.base_model, passes.clean
        passes.set_masks()
        with self._scope(weights, inputs, inputs.state):
            penalties = base.losses
        layer_losses = [*clean.layer_losses, *penalties]
        self._check_has_loss(layer_losses)
        is_at_theta = passes.perturbed is None or self.options.runs_at_theta
        own_weights = weights if is_at_theta else self._weights_of_loss(weights, inputs)
        loss = self._loss(own_weights, inputs, clean.y_pred, layer_losses)
        mean_divergence = ops.zeros((), loss.dtype)
        terms = Terms(loss, loss, mean_divergence, mean_divergence)
        if passes.perturbed is not None:
            penalty = self._penalty(own_weights, inputs, clean, loss, penalties)
            terms, mean_divergence = self._perturbed_terms(
                weights, inputs, passes, loss, penalty
            )
        return Outcome(
            terms,
            ops.cast(mean_divergence, loss.dtype),
            clean.y_pred,
            clean.masks,
            clean.state,
            clean.updates,
            layer_losses,
        )

    def _perturbed_terms(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        passes: Passes,
        loss: Tensor,
        penalty: Tensor,
    ) -> tuple[Terms, Tensor]:
        """The terms of a step with a perturbation, and the mean of its divergence.

        `loss` is that of the first pass, `penalty` its part that is weight penalties.
        """
        options = self.options
        perturbed = self._perturbed_losses(weights, inputs, passes)
        if not options.runs_at_theta:
            perturbed = [loss - penalty, *perturbed]
        divergence = mean_divergence = ops.zeros((), loss.dtype)
        if options.has_divergence:
            divergence, mean_divergence = self._divergence_terms(inputs, passes)
        terms = combine(
            loss,
            ops.cast(divergence, loss.dtype),
            _mean(perturbed),
            alpha=ops.cast(inputs.alpha, loss.dtype),
            beta=options.beta,
            scheme=options.scheme,
            normalize=options.normalize,
            penalty=penalty,
        )
        if not passes.perturbed:
            # The only pass's, as it is: a sum of its parts would be rounded.
            terms = terms._replace(total=loss)
        return terms, mean_divergence

    def _penalty(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        clean: CleanPass,
        loss: Tensor,
        penalties: Sequence[Tensor],
    ) -> Tensor:
        """The part of the loss of the first pass that is weight penalties."""
        if penalties and self._has_own_loss:
            # It may leave them out, or weigh them.
            return loss - self._loss(weights, inputs, clean.y_pred, clean.layer_losses)
        added = [keras_internals.additional_loss(self.base_model, p) for p in penalties]
        return ops.convert_to_tensor(sum(added), loss.dtype)

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

    def _perturbed_losses(
        self, weights: list[Tensor], inputs: StepInputs, passes: Passes
    ) -> list[Tensor]:
        """L(theta + delta) of each pass that follows the first one."""
        return [
            self._perturbed_loss(
                self._weights_of_loss(weights, inputs, passes.gradients, sign=sign),
                inputs,
                passes,
                y_pred,
                layer_losses,
            )
            for sign, y_pred, layer_losses in zip(
                self.options.signs,
                passes.perturbed or [],
                passes.perturbed_losses,
                strict=True,
            )
        ]

    def _weights_of_loss(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        gradients: list[Tensor] | None = None,
        *,
        sign: int = 1,
    ) -> list[Tensor]:
        """theta + delta of the first group, for a `compute_loss()` that reads it."""
        if not self._has_own_loss:
            return weights
        # The same key draws the same delta.
        stream = self._stream(inputs, 0)
        deltas = self.draw(weights, inputs, stream, gradients, sign=sign)
        return self._perturbed_weights(weights, deltas)

    def _perturbed_loss(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        passes: Passes,
        y_pred: Any,
        layer_losses: Sequence[Tensor],
    ) -> Tensor:
        """L(theta + delta), or its estimate from a share of the batch.

        The estimate is the loss of the outputs at theta, plus the difference that the
        perturbed outputs make, divided by their share. It has no bias for losses that
        are sums over samples, however these are masked, weighted and divided.
        """
        share = passes.perturbed_share
        if share is None:
            return self._loss(weights, inputs, y_pred, layer_losses)
        self._check_is_sum(inputs, y_pred)
        fixed = tree.map_structure(ops.stop_gradient, passes.clean.y_pred)
        fixed = with_masks(fixed, passes.clean.masks)
        at_theta = self._loss(weights, inputs, fixed, layer_losses)
        difference = self._loss(weights, inputs, y_pred, layer_losses) - at_theta
        return at_theta + difference / ops.cast(share, difference.dtype)

    def _divergence_terms(
        self, inputs: StepInputs, passes: Passes
    ) -> tuple[Tensor, Tensor]:
        """The divergence of a batch, reduced as the loss is, and its mean."""
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(inputs.batch)
        resolved = self.divergences.of(self.base_model, passes.compared, y)

        def total(divergences: Sequence[OutputDivergence]) -> Tensor:
            value = _mean(
                [
                    total_divergence(
                        divergences, y, passes.compared, perturbed, sample_weight
                    )
                    for perturbed in passes.perturbed or []
                ]
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


def _unscaled(gradient: Tensor, scale: Any) -> Tensor:
    """A gradient divided by the scale of its loss, in float32 or float64."""
    dtype = keras.backend.standardize_dtype(gradient.dtype)
    is_one = isinstance(scale, float) and scale == 1
    if is_one or not keras.backend.is_float_dtype(dtype):
        return gradient
    dtype = "float64" if dtype == "float64" else "float32"
    return ops.cast(gradient, dtype) / ops.cast(scale, dtype)


def _mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of scalars: of one, the scalar itself."""
    return values[0] if len(values) == 1 else sum(values) / len(values)
