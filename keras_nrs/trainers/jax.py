"""The training step on JAX."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import keras

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.backend.jax.devices import replicas
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import with_masks
from keras_nrs.trainers.jax_passes import PassesOnOneDevice
from keras_nrs.trainers.jax_passes import PassesOnReplicas
from keras_nrs.trainers.trainer import Logs
from keras_nrs.trainers.trainer import Trainer

Tensor = Any


class PerturbedStep(NamedTuple):
    """A batch on which the perturbed pass runs.

    `eps` and `alpha` are arguments of the compiled step rather than constants in it,
    so that assigning them takes effect at the next step and never retraces.
    """

    batch: Any
    eps: Tensor
    alpha: Tensor


class CleanStep(NamedTuple):
    """A batch on which the perturbed pass is skipped.

    The type is part of the step's signature, so `jax.jit` compiles a program without
    the second pass. A `lax.cond` would do in one program, but XLA's CPU compiler runs
    convolutions inside a conditional about ten times slower.
    """

    batch: Any


class BaseState(NamedTuple):
    """Values of the base model's variables, as its own steps take them."""

    trainable: list[Tensor]
    non_trainable: list[Tensor]
    optimizer: list[Tensor]
    metrics: list[Tensor]


class BackendTrainer(Trainer):
    """The steps of an `NRSModel`, as `keras.Model` calls them on JAX."""

    # The number of steps, and the state of the seed after them: a tensor that `fit()`
    # has at this position.
    _step = 0
    _seed: Any = None
    _position = 0
    _has_weights = True

    def make_train_function(self, make: Callable[[bool], None], force: bool) -> None:
        model = self.model
        is_new = force or model.train_function is None
        make(force)
        if self.options.scheme == "baseline":
            return
        seed = id(model.seed_generator.state)
        self._position = list(map(id, model.non_trainable_variables)).index(seed)
        if is_new:
            train_function = model.train_function

            def planned_train_function(state: Any, batches: Iterator[Any]) -> Any:
                self._has_weights = bool(state[0])
                # A callback may have restored another state. Otherwise steps are
                # counted: reading their number would wait for the step before.
                seed = state[1][self._position]
                if seed is not self._seed:
                    self._step = int(keras.ops.convert_to_numpy(seed)[1])
                self._seed = None
                try:
                    result = train_function(state, map(self._plan_step, batches))
                except Exception as error:
                    # An error in the first step would leave a model without weights.
                    keras_internals.restore_jax_state(model, state)
                    if isinstance(error, jax.errors.UnexpectedTracerError):
                        raise ValueError(self._leak_message()) from error
                    raise
                _, new_state = result
                self._seed = new_state[1][self._position]
                return result

            model.train_function = planned_train_function

    def _leak_message(self) -> str:
        return (
            "`model` must not read a tensor after the pass that computed it, as where "
            "compute_loss() reads what call() kept in an attribute. Received: a model "
            f"named {self.base_model.name!r}. Return that tensor as an output, or call "
            "self.add_loss() in call()."
        )

    def num_replicas(self) -> int:
        return replicas()[1]

    def _plan_step(self, batch: Any) -> PerturbedStep | CleanStep:
        step, self._step = self._step, self._step + 1
        eps, alpha = self.coefficients_in(step)
        is_due = self._has_weights and step % self.options.interval == 0
        if is_due and self.needs_perturbed_pass():
            return PerturbedStep(batch, eps, alpha)
        return CleanStep(batch)

    def train_step(self, state: Any, data: Any) -> tuple[Logs, Any]:
        trainable, non_trainable, optimizer, metrics = state
        base, model = self.base_model, self.model
        if self.options.scheme == "baseline":
            data = CleanStep(data)
        elif not isinstance(data, PerturbedStep | CleanStep):
            # No variable may keep a value that is traced here.
            step = self._key(non_trainable)[1]
            data = PerturbedStep(data, *(c.at(step) for c in model.coefficients))
        base_state = BaseState(
            trainable,
            self._base_non_trainable(non_trainable),
            optimizer,
            self._base_metrics(metrics),
        )
        outcome = None
        if isinstance(data, CleanStep):
            logs, new_state = base.train_step(tuple(base_state), data.batch)
            base_state = BaseState(*new_state)
        else:
            logs, outcome, base_state = self._perturbed_train_step(
                base_state, data, self._key(non_trainable)
            )
        own_logs, updates = self._advance(non_trainable, metrics, outcome, data.batch)
        updates |= _by_id(base.non_trainable_variables, base_state.non_trainable)
        updates |= _by_id(base.metrics_variables, base_state.metrics)
        return logs | own_logs, (
            base_state.trainable,
            _replace(model.non_trainable_variables, non_trainable, updates),
            base_state.optimizer,
            _replace(model.metrics_variables, metrics, updates),
        )

    def _key(self, non_trainable: list[Tensor]) -> Tensor:
        """The key of a step, before its draw."""
        by_id = _by_id(self.model.non_trainable_variables, non_trainable)
        return by_id[id(self.model.seed_generator.state)]

    def _perturbed_train_step(
        self, state: BaseState, data: PerturbedStep, key: Tensor
    ) -> tuple[Logs, Outcome, BaseState]:
        """The logs, the outcome, and the new state of the base model."""
        base = self.base_model
        gradients, outcome = self._gradients(state, data, key)
        trainable, optimizer = base.optimizer.stateless_apply(
            state.optimizer, gradients, state.trainable
        )
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data.batch)
        y_pred = with_masks(outcome.y_pred, outcome.masks)
        metrics = state.metrics
        if self.objective.loss_updates_metrics:
            with stateless.layer_losses(base, outcome.layer_losses):
                _, (_, _, metrics) = base.stateless_compute_loss(
                    state.trainable,
                    state.non_trainable,
                    metrics,
                    x=x,
                    y=y,
                    y_pred=y_pred,
                    sample_weight=sample_weight,
                    training=True,
                )
        logs, metrics = keras_internals.update_jax_metrics(
            base,
            metrics,
            outcome.terms.total,
            x=x,
            y=y,
            y_pred=y_pred,
            sample_weight=sample_weight,
        )
        new_state = BaseState(trainable, outcome.state, optimizer, metrics)
        return logs, outcome, new_state

    def _gradients(
        self, state: BaseState, data: PerturbedStep, key: Tensor
    ) -> tuple[list[Tensor], Outcome]:
        """The gradients times the optimizer's loss scale, and the outcome."""
        objective, optimizer = self.objective, self.base_model.optimizer
        objective.find_variables()
        optimizer_values = list(zip(optimizer.variables, state.optimizer, strict=True))
        with keras.StatelessScope(optimizer_values):
            loss_scale = optimizer.scale_loss(1.0)
        inputs = StepInputs(
            state.non_trainable,
            state.metrics,
            data.batch,
            data.eps,
            data.alpha,
            key,
            loss_scale=loss_scale,
        )
        axis, num_replicas, mesh = replicas()
        passes: PassesOnOneDevice | PassesOnReplicas
        if num_replicas == 1:
            passes = PassesOnOneDevice(objective, inputs)
        else:
            passes = PassesOnReplicas(objective, inputs, axis, mesh)
        copies = passes.copies(state.trainable)
        passes.find_directions(copies)

        def scaled_total(
            weights: list[Tensor], copies: list[Tensor], outputs: Any
        ) -> tuple[Tensor, Outcome]:
            outcome = objective.outcome(weights, inputs, passes.passes(copies, outputs))
            with keras.StatelessScope(optimizer_values):
                scaled = optimizer.scale_loss(outcome.terms.total)
            # As in plain Keras on JAX, no other assignment is kept.
            return scaled, outcome._replace(updates=[])

        memory_efficient = objective.options.memory_efficient
        outputs: Any = []
        if memory_efficient and objective.options.signs:
            outputs, tables = passes.perturbed_outputs(copies)
        elif objective.options.signs:
            (outputs, tables), pullback = jax.vjp(passes.perturbed_outputs, copies)
        (of_loss, of_first, cotangents), outcome = jax.grad(
            scaled_total, argnums=(0, 1, 2), has_aux=True, allow_int=True
        )(state.trainable, copies, outputs)
        of_passes = [of_first]
        if objective.options.signs:
            # Those of tables go on through the other passes, which add to them.
            of_tables = {i: of_first[i] for i in tables}
            rest = [None if i in tables else g for i, g in enumerate(of_first)]
            if memory_efficient:
                # Once more, after all of the clean pass: activations of one at a time.
                _, pullback = jax.vjp(
                    lambda copies: passes.perturbed_outputs(copies, of_first), copies
                )
            of_passes = [rest, *pullback((cotangents, of_tables))]
        gradients = passes.summed(*of_passes)
        return jax.tree.map(jax.numpy.add, gradients, of_loss), outcome

    def _advance(
        self, non_trainable: Any, metrics: Any, outcome: Outcome | None, batch: Any
    ) -> tuple[Logs, dict[int, Tensor]]:
        """The trackers' logs, and new values of the wrapped model's own variables."""
        if self.options.scheme == "baseline":
            return {}, {}
        model = self.model
        mapping = list(zip(model.non_trainable_variables, non_trainable, strict=True))
        mapping += zip(model.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(mapping) as scope:
            model.seed_generator.next()
            if outcome is not None:
                self.update_trackers(
                    outcome.mean_divergence, outcome.terms.perturbed_loss, batch
                )
            logs = self.tracker_logs()
        own = [model.seed_generator.state]
        own += [v for tracker in self.trackers for v in tracker.variables]
        return logs, {id(v): scope.get_current_value(v) for v in own}

    def test_step(self, state: Any, data: Any) -> tuple[Logs, Any]:
        trainable, non_trainable, metrics = state
        base, model = self.base_model, self.model
        base_state = (
            trainable,
            self._base_non_trainable(non_trainable),
            self._base_metrics(metrics),
        )
        logs, (trainable, base_non_trainable, base_metrics) = base.test_step(
            base_state, data
        )
        updates = _by_id(base.non_trainable_variables, base_non_trainable)
        updates |= _by_id(base.metrics_variables, base_metrics)
        return logs, (
            trainable,
            _replace(model.non_trainable_variables, non_trainable, updates),
            _replace(model.metrics_variables, metrics, updates),
        )

    def predict_step(self, state: Any, data: Any) -> tuple[Any, list[Tensor]]:
        trainable, non_trainable = state
        base, model = self.base_model, self.model
        outputs, base_non_trainable = base.predict_step(
            (trainable, self._base_non_trainable(non_trainable)), data
        )
        updates = _by_id(base.non_trainable_variables, base_non_trainable)
        return outputs, _replace(model.non_trainable_variables, non_trainable, updates)

    def _base_non_trainable(self, values: list[Tensor]) -> list[Tensor]:
        """The part of the wrapped model's non-trainable values that is the base's."""
        by_id = _by_id(self.model.non_trainable_variables, values)
        return [by_id[id(v)] for v in self.base_model.non_trainable_variables]

    def _base_metrics(self, values: list[Tensor]) -> list[Tensor]:
        """The part of the wrapped model's metric values that is the base's."""
        by_id = _by_id(self.model.metrics_variables, values)
        return [by_id[id(v)] for v in self.base_model.metrics_variables]


def _by_id(variables: list[Any], values: list[Tensor]) -> dict[int, Tensor]:
    return {id(v): value for v, value in zip(variables, values, strict=True)}


def _replace(
    variables: list[Any], values: list[Tensor], updates: dict[int, Tensor]
) -> list[Tensor]:
    """`values` with the updates of some variables, which their `id` names."""
    values_by_id = _by_id(variables, values) | updates
    return [values_by_id[id(v)] for v in variables]
