"""The training step and the random numbers on JAX."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import keras

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


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = jax.random.wrap_key_data(
            jax.numpy.asarray(key, "uint32"), impl="threefry2x32"
        )
        self._draws = 0

    def _next_key(self) -> Tensor:
        self._draws += 1
        return jax.random.fold_in(self._key, self._draws)

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Standard normal numbers."""
        return jax.random.normal(self._next_key(), shape, dtype)

    def rademacher(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Signs, -1 or 1 with equal probability."""
        return jax.random.rademacher(self._next_key(), shape, dtype)

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        return jax.random.uniform(self._next_key(), shape, dtype)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of tensors."""
    compiled: Callable[..., Any] = jax.jit(function)
    return compiled


def _by_id(variables: list[Any], values: list[Tensor]) -> dict[int, Tensor]:
    return {id(v): value for v, value in zip(variables, values, strict=True)}


def _replace(
    variables: list[Any], values: list[Tensor], updates: dict[int, Tensor]
) -> list[Tensor]:
    """`values` with those of some variables, named by their `id`, replaced."""
    values_by_id = _by_id(variables, values) | updates
    return [values_by_id[id(v)] for v in variables]


class BackendTrainer:
    """Steps of an `NRSModel`, as `keras.Model` calls them on JAX."""

    def make_train_function(self: Any, force: bool = False) -> None:
        is_new = force or self.train_function is None
        super().make_train_function(force)  # type: ignore[misc]
        if self.scheme == "baseline":
            return
        # Counted here, because reading it from the device would wait for the step.
        self._step = int(self.seed_generator.state[1])
        if is_new:
            train_function = self.train_function

            def planned_train_function(state: Any, batches: Iterator[Any]) -> Any:
                try:
                    return train_function(state, self._plan_steps(batches))
                except Exception:
                    self._put_back(state)
                    raise

            self.train_function = planned_train_function

    def _put_back(self: Any, state: Any) -> None:
        """Give the variables their values again, which Keras moved into the state.

        Without this an error in the first step would leave a model without weights.
        """
        names = ("trainable", "non_trainable", "optimizer", "metrics")
        values = [value for part in state for value in part]
        if not getattr(self, "_jax_state", None) and not any(
            value.is_deleted() for value in values
        ):
            self._jax_state = {
                f"{name}_variables": part
                for name, part in zip(names, state, strict=True)
            }
            self._jax_state_synced = False
            self.jax_state_sync()
            self._jax_state = None

    def _plan_steps(self: Any, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield self._plan_step(batch)

    def _plan_step(self: Any, batch: Any) -> Any:
        step, self._step = self._step, self._step + 1
        if step % self.interval == 0 and self._perturbed_pass_matters():
            return PerturbedStep(batch, self.eps.value, self.alpha.value)
        return CleanStep(batch)

    def train_step(self: Any, state: Any, data: Any) -> Any:
        if self.scheme == "baseline":
            data = CleanStep(data)
        elif not isinstance(data, PerturbedStep | CleanStep):
            data = PerturbedStep(data, self.eps.value, self.alpha.value)
        trainable, non_trainable, optimizer, metrics = state
        base = self.base_model
        base_non_trainable, base_metrics = self._base_state(non_trainable, metrics)
        if isinstance(data, CleanStep):
            logs, (trainable, base_non_trainable, optimizer, base_metrics) = (
                base.train_step(
                    (trainable, base_non_trainable, optimizer, base_metrics), data.batch
                )
            )
            terms = None
        else:
            gradients, terms, y_pred, base_non_trainable, base_metrics = (
                self._gradients(
                    trainable,
                    base_non_trainable,
                    optimizer,
                    base_metrics,
                    data=data,
                    key=_by_id(self.non_trainable_variables, non_trainable)[
                        id(self.seed_generator.state)
                    ],
                )
            )
            trainable, optimizer = base.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data.batch)
            logs, base_metrics = base._update_metrics_variables(
                base_metrics, terms.total, x, y, y_pred, sample_weight
            )
        own_logs, own_updates = self._advance(non_trainable, metrics, terms, data.batch)
        updates = _by_id(base.non_trainable_variables, base_non_trainable)
        updates |= _by_id(base.metrics_variables, base_metrics)
        updates |= own_updates
        state = (
            trainable,
            _replace(self.non_trainable_variables, non_trainable, updates),
            optimizer,
            _replace(self.metrics_variables, metrics, updates),
        )
        return logs | own_logs, state

    def _gradients(
        self: Any,
        trainable: list[Tensor],
        non_trainable: list[Tensor],
        optimizer: list[Tensor],
        metrics: list[Tensor],
        *,
        data: PerturbedStep,
        key: Tensor,
    ) -> Any:
        base = self.base_model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data.batch)
        kwargs = self._call_kwargs(training=True)
        deltas = self._sample(trainable, data.eps, RandomStream(key))

        def compute_loss(
            weights: list[Tensor], y_pred: Any, layer_losses: list[Tensor]
        ) -> Any:
            with self._layer_losses(layer_losses):
                return base.stateless_compute_loss(
                    weights,
                    non_trainable,
                    metrics,
                    x=x,
                    y=y,
                    y_pred=y_pred,
                    sample_weight=sample_weight,
                    training=True,
                )

        def objective(weights: list[Tensor]) -> Any:
            y_pred, updated, layer_losses = base.stateless_call(
                weights, non_trainable, x, return_losses=True, **kwargs
            )
            clean_loss, (_, _, updated_metrics) = compute_loss(
                weights, y_pred, layer_losses
            )
            perturbed_weights = self._add(weights, deltas)
            perturbed, _ = base.stateless_call(
                perturbed_weights, non_trainable, x, **kwargs
            )
            perturbed_loss, _ = compute_loss(perturbed_weights, perturbed, [])
            terms = self._terms(
                clean_loss,
                self._divergence(y, y_pred, perturbed, sample_weight),
                perturbed_loss,
                penalty=sum(map(keras.ops.sum, layer_losses)),
                alpha=data.alpha,
            )
            with keras.StatelessScope(
                list(zip(base.optimizer.variables, optimizer, strict=True))
            ):
                scaled = base.optimizer.scale_loss(terms.total)
            return scaled, (terms, y_pred, updated, updated_metrics)

        gradients, auxiliary = jax.grad(objective, has_aux=True)(trainable)
        return gradients, *auxiliary

    def _advance(
        self: Any, non_trainable: Any, metrics: Any, terms: Any, batch: Any
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """The trackers' logs, and the new values of this model's own variables."""
        if self.scheme == "baseline":
            return {}, {}
        mapping = list(zip(self.non_trainable_variables, non_trainable, strict=True))
        mapping += zip(self.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(mapping) as scope:
            self.seed_generator.next()
            if terms is not None:
                self._update_trackers(terms, batch)
            logs = self._tracker_logs()
        own = [self.seed_generator.state]
        own += [v for tracker in self._trackers for v in tracker.variables]
        return logs, {id(v): scope.get_current_value(v) for v in own}

    def test_step(self: Any, state: Any, data: Any) -> Any:
        trainable, non_trainable, metrics = state
        base = self.base_model
        base_non_trainable, base_metrics = self._base_state(non_trainable, metrics)
        logs, (trainable, base_non_trainable, base_metrics) = base.test_step(
            (trainable, base_non_trainable, base_metrics), data
        )
        updates = _by_id(base.non_trainable_variables, base_non_trainable)
        updates |= _by_id(base.metrics_variables, base_metrics)
        return logs, (
            trainable,
            _replace(self.non_trainable_variables, non_trainable, updates),
            _replace(self.metrics_variables, metrics, updates),
        )

    def predict_step(self: Any, state: Any, data: Any) -> Any:
        trainable, non_trainable = state
        base = self.base_model
        values = _by_id(self.non_trainable_variables, non_trainable)
        base_non_trainable = [values[id(v)] for v in base.non_trainable_variables]
        outputs, base_non_trainable = base.predict_step(
            (trainable, base_non_trainable), data
        )
        updates = _by_id(base.non_trainable_variables, base_non_trainable)
        return outputs, _replace(self.non_trainable_variables, non_trainable, updates)

    def _base_state(self: Any, non_trainable: Any, metrics: Any) -> tuple[Any, Any]:
        """The part of this model's state that belongs to the base model."""
        base = self.base_model
        values = _by_id(self.non_trainable_variables, non_trainable)
        values |= _by_id(self.metrics_variables, metrics)
        return (
            [values[id(v)] for v in base.non_trainable_variables],
            [values[id(v)] for v in base.metrics_variables],
        )
