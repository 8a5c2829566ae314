"""The contract of the trainers, one for each backend."""

import abc
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from typing import Protocol

import keras

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.backend import not_in_graphs
from keras_nrs.coefficients import Coefficient
from keras_nrs.step.batch_objective import BatchObjective
from keras_nrs.step.groups import num_samples
from keras_nrs.step.model_passes import SplitBatch
from keras_nrs.step.objective import Terms
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import with_masks
from keras_nrs.step.output_divergences import copied_weights

Tensor = Any
Logs = dict[str, Tensor]
# Takes the mean of tensors over all replicas.
Mean = Callable[[list[Tensor]], list[Tensor]]


class TrainedModel(Protocol):
    """The attributes of an `NRSModel` that trainers use."""

    built: bool
    train_function: Any
    run_eagerly: bool
    jit_compile: Any
    coefficients: tuple[Coefficient, Coefficient]
    seed_generator: keras.random.SeedGenerator
    distribute_strategy: Any
    variables: list[keras.Variable]
    non_trainable_variables: list[keras.Variable]
    metrics_variables: list[keras.Variable]


class Trainer(abc.ABC):
    """The steps of an `NRSModel`, as Keras calls them on one backend.

    Args:
        model: The `NRSModel`.
        objective: Equation 3 for its base model.
        trackers: The epoch's means of `model_divergence` and `perturbed_loss`, which
            are their names, of a scheme that has them.
    """

    def __init__(
        self,
        model: TrainedModel,
        objective: BatchObjective,
        trackers: Sequence[keras.metrics.Metric],
    ) -> None:
        self.model = model
        self.objective = objective
        self.options = objective.options
        self.base_model = objective.base_model
        self.trackers = trackers

    @abc.abstractmethod
    def make_train_function(self, make: Callable[[bool], None], force: bool) -> None:
        """Make `model.train_function`.

        Args:
            make: Keras's own `make_train_function(force)`.
            force: Whether to make it anew.
        """

    @abc.abstractmethod
    def num_replicas(self) -> int:
        """The number of devices among which the batches of training are split."""

    @abc.abstractmethod
    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of `fit()`, with the arguments and results of Keras's own."""

    @abc.abstractmethod
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of `evaluate()`: the base model's."""

    @abc.abstractmethod
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of `predict()`: the base model's."""

    def joined_metrics(self) -> AbstractContextManager[None] | None:
        """A scope in which metrics are those of all processes.

        `None` where they always are.
        """
        return None

    def first_batch(self, iterator: Any, data_batch: Any) -> Any:
        """The batch for which TensorFlow's `fit()` builds a model, `None` elsewhere."""
        return data_batch

    def needs_perturbed_pass(self) -> bool:
        """Whether anything of the perturbed pass is minimized now."""
        eps, alpha = self.model.coefficients
        if eps.is_paused:
            return False
        return self.objective.needs_perturbed_pass(
            alpha.variable if alpha.schedule is None else None
        )

    @not_in_graphs
    def coefficients_in(self, step: Any) -> list[Tensor]:
        """eps and alpha in a training step, which their variables show from then on.

        Args:
            step: Number of steps before it, those without a perturbed pass too.
        """
        for coefficient in self.model.coefficients:
            if coefficient.schedule is not None:
                coefficient.variable.assign(coefficient.at(step))
        return [coefficient.variable.value for coefficient in self.model.coefficients]

    def with_directions(
        self, weights: list[Tensor], inputs: StepInputs, batch: SplitBatch, mean: Mean
    ) -> SplitBatch:
        """The batch with gradients of one replica, or their mean over all.

        Args:
            weights: Values of the base model's trainable variables.
            inputs: The other inputs of the step.
            batch: The batch of one replica.
            mean: A function that takes the mean of tensors over all replicas.
        """
        batch = self.objective.with_directions(weights, inputs, batch)
        if not self.options.sync_perturbation:
            return batch
        microbatches = [
            microbatch
            if microbatch.gradients is None
            else microbatch._replace(gradients=mean(microbatch.gradients))
            for microbatch in batch.microbatches
        ]
        return batch._replace(microbatches=microbatches)

    @staticmethod
    def with_mean_state(outcome: Outcome, inputs: StepInputs, mean: Mean) -> Outcome:
        """An outcome whose moving statistics are means over all replicas."""
        moved = [
            new
            for new, old in zip(outcome.state, inputs.state, strict=True)
            if new is not old
            and keras.backend.is_float_dtype(keras.backend.standardize_dtype(new.dtype))
        ]
        means = dict(zip(map(id, moved), mean(moved), strict=True))
        state = [means.get(id(value), value) for value in outcome.state]
        return outcome._replace(state=state)

    def update_metrics_of_loss(self, outcome: Outcome, data: Any) -> None:
        """Update in place the metrics that `compute_loss()` updates, if it does.

        It may read weights: call this before the optimizer moves them.
        """
        if not self.objective.loss_updates_metrics:
            return
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = with_masks(outcome.y_pred, outcome.masks)
        with stateless.layer_losses(base, outcome.layer_losses):
            keras_internals.compute_loss(
                base, x, y, y_pred, copied_weights(sample_weight), training=True
            )

    def assign_outcome(
        self,
        outcome: Outcome,
        data: Any,
        *,
        weight: Any = 1,
        unscaled: Callable[[Tensor], Tensor] = lambda term: term,
    ) -> Logs:
        """Update states and metrics in place.

        Args:
            outcome: The outcome of the step.
            data: The batch.
            weight: 0 for a step without a perturbed pass.
            unscaled: A function that takes Keras's scaling out of a term.

        Returns:
            The logs.
        """
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        variables = self.objective.variables.non_trainable
        for variable, value in zip(variables, outcome.state, strict=True):
            if value is not variable.value:
                variable.assign(value)
        terms = Terms(*map(unscaled, outcome.terms))
        mean_divergence = unscaled(outcome.mean_divergence)
        y_pred = with_masks(outcome.y_pred, outcome.masks)
        keras_internals.loss_tracker(base).update_state(
            terms.total, sample_weight=num_samples(x)
        )
        self.update_trackers(mean_divergence, terms.perturbed_loss, data, weight=weight)
        logs: Logs = base.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs | self.tracker_logs()

    def update_trackers(
        self, divergence: Tensor, perturbed_loss: Tensor, data: Any, *, weight: Any = 1
    ) -> None:
        """Count the divergence and the loss of a batch into the means of the epoch."""
        samples = num_samples(data) * weight
        terms = {"model_divergence": divergence, "perturbed_loss": perturbed_loss}
        for tracker in self.trackers:
            tracker.update_state(terms[tracker.name], sample_weight=samples)

    def tracker_logs(self) -> Logs:
        """The means of the epoch so far."""
        return {tracker.name: tracker.result() for tracker in self.trackers}
