"""The training step on JAX."""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any
from typing import NamedTuple

import jax
import keras
from jax.sharding import PartitionSpec as P
from keras.src.backend.jax import trainer as keras_trainer

from keras_nrs.step.groups import Outcome
from keras_nrs.step.groups import StepInputs
from keras_nrs.step.groups import num_samples
from keras_nrs.step.groups import with_masks

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


def replicas() -> tuple[str, int, Any]:
    """The mesh axis over which batches are split, its size, and the mesh."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return "", 1, None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    return axis, mesh.shape[axis], mesh


def _mean_over(axis: str, tensor: Tensor) -> Tensor:
    """The mean over replicas; of counters and seeds, which are equal, the value."""
    if jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
        return jax.lax.pmean(tensor, axis)
    if tensor.dtype == bool:
        return jax.lax.pmax(tensor.astype("int32"), axis) > 0
    return jax.lax.pmax(tensor, axis)


def _mean_sum_over(axis: str, gradient: Tensor, other: Tensor) -> Tensor:
    """The mean over replicas of the sum of two gradients.

    Of matrices they are transposed products. XLA's CPU compiler would fold that
    transposition into the products, which then miss its fast kernels: so it is undone
    here, and done after the sums, where Keras's own step has it.
    """
    if gradient.ndim != 2:
        return _mean_over(axis, gradient + other)
    return _mean_over(axis, gradient.T + other.T).T


def _after(tensors: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The values, for use after the tensors have been computed.

    XLA's CPU compiler drops barriers before it chooses an order, so this is arithmetic
    that it does not see through: adding what is 0 unless one of the tensors is not a
    number.
    """
    probe = sum(t[(0,) * t.ndim].astype("float32") for t in tensors)
    zero = jax.numpy.where(probe == probe, 0.0, jax.numpy.nan)
    return [value + zero.astype(value.dtype) for value in values]


def _share(batch: Any, index: Tensor, size: int, num_shares: int) -> Any:
    """Share `index` of a batch that is cut into equal ones."""
    length = size // num_shares
    return jax.tree.map(
        lambda t: jax.lax.dynamic_slice_in_dim(t, index * length, length), batch
    )


@contextmanager
def _loop_over_batches() -> Iterator[None]:
    """What Keras's `fit()`, `evaluate()` and `predict()` run in.

    Batches that do not divide among the devices go to all of them as a whole. Keras
    refuses to place them.
    """
    place = keras_trainer._distribute_data

    def place_any(data: Any, layouts: Any = None) -> Any:
        _, num_replicas, mesh = replicas()
        sizes = {t.shape[0] for t in keras.tree.flatten(data) if t is not None}
        num_processes = jax.process_count()
        num_local = max(1, num_replicas // num_processes)
        if all(size % num_local == 0 for size in sizes):
            return place(data, layouts)
        if num_processes > 1:
            raise ValueError(
                "In a run of several processes, the batches of each must divide among "
                f"its devices. Received: a batch of {sizes} samples for {num_local} "
                "devices. Use dataset.batch(batch_size, drop_remainder=True) with a "
                f"batch size that is a multiple of {num_replicas}."
            )
        everywhere = jax.sharding.NamedSharding(mesh, P())
        return keras.tree.map_structure(
            lambda t: None if t is None else jax.device_put(t, everywhere), data
        )

    keras_trainer._distribute_data = place_any
    try:
        yield
    finally:
        keras_trainer._distribute_data = place


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

    _loop_over_batches = staticmethod(_loop_over_batches)
    process_index = staticmethod(jax.process_index)

    @staticmethod
    def _scope_of(model: Any) -> AbstractContextManager[None]:
        """A scope in which variables are placed on the devices that the model is on."""
        is_placed = keras.distribution.distribution() is not None
        sharding = model.variables[0].value.sharding if model.variables else None
        if is_placed or not isinstance(sharding, jax.sharding.NamedSharding):
            return nullcontext()
        devices = sharding.mesh.devices
        mesh = keras.distribution.DeviceMesh(
            devices.shape,
            sharding.mesh.axis_names,
            [f"{d.platform}:{d.id}" for d in devices.flatten()],
        )
        # Without a layout for any variable: they are replicated.
        layouts = keras.distribution.LayoutMap(mesh)
        scope: Any = keras.distribution.ModelParallel(layout_map=layouts).scope()
        return scope

    @staticmethod
    def values_of_processes(values: list[int]) -> list[list[int]]:
        """These values in every process. All of them must call this."""
        if jax.process_count() == 1:
            return [values]
        from jax.experimental import multihost_utils

        gathered = multihost_utils.process_allgather(jax.numpy.asarray(values))
        return [list(map(int, row)) for row in gathered]

    def make_train_function(self: Any, force: bool = False) -> None:
        is_new = force or self.train_function is None
        super().make_train_function(force)  # type: ignore[misc]
        if self.scheme == "baseline":
            return
        # Counted here, because reading it from the device would wait for the step.
        state = keras.ops.convert_to_numpy(self.seed_generator.state)
        self._step = int(state[1])
        if is_new:
            train_function = self.train_function

            def planned_train_function(state: Any, batches: Iterator[Any]) -> Any:
                try:
                    return train_function(state, self._plan_steps(batches))
                except Exception as error:
                    self._put_back(state)
                    if isinstance(error, jax.errors.UnexpectedTracerError):
                        raise ValueError(self._of_leaks()) from error
                    raise

            self.train_function = planned_train_function

    def _of_leaks(self: Any) -> str:
        return (
            "`model` must not read a tensor after the pass that computed it, as where "
            "compute_loss() reads what call() kept in an attribute. Received: a model "
            f"named {self.base_model.name!r}. Return that tensor as an output, or call "
            "self.add_loss() in call()."
        )

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
            key = _by_id(self.non_trainable_variables, non_trainable)[
                id(self.seed_generator.state)
            ]
            base_state = (trainable, base_non_trainable, optimizer, base_metrics)
            gradients, outcome = self._gradients_of_replicas(base_state, data, key)
            terms, base_non_trainable = outcome.terms, outcome.state
            trainable, optimizer = base.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data.batch)
            y_pred = with_masks(outcome.y_pred, outcome.masks)
            if self._loss_updates_metrics():
                _, (_, _, base_metrics) = base.stateless_compute_loss(
                    *base_state[:2],
                    base_metrics,
                    x=x,
                    y=y,
                    y_pred=y_pred,
                    sample_weight=sample_weight,
                    training=True,
                )
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
        self: Any, state: Any, data: PerturbedStep, key: Tensor, **replica: Any
    ) -> tuple[list[Tensor], list[Tensor], Outcome]:
        """The gradients through both passes on one replica, and their outcome.

        Their sum is the gradient of the total times the optimizer's loss scale.
        """
        trainable, non_trainable, optimizer, metrics = state
        inputs = StepInputs(
            non_trainable, metrics, data.batch, data.eps, data.alpha, key, **replica
        )
        optimizer_mapping = list(
            zip(self.base_model.optimizer.variables, optimizer, strict=True)
        )

        parts = self._parts(inputs)

        def perturbed_outputs(weights: list[Tensor]) -> list[Any]:
            outputs: list[Any] = self._perturbed_outputs(weights, inputs, parts)
            return outputs

        def objective(
            weights: list[Tensor], outputs: list[Any]
        ) -> tuple[Tensor, Outcome]:
            outcome = self._objective(weights, inputs, perturbed_outputs=outputs)
            with keras.StatelessScope(optimizer_mapping):
                scaled = self.base_model.optimizer.scale_loss(outcome.terms.total)
            return scaled, outcome

        if self.memory_efficient:
            outputs = perturbed_outputs(trainable)
        else:
            outputs, pullback = jax.vjp(perturbed_outputs, trainable)
        (of_clean, cotangents), outcome = jax.grad(
            objective, argnums=(0, 1), has_aux=True, allow_int=True
        )(trainable, outputs)
        if self.memory_efficient:
            # Once more, after all of the clean pass: activations of one at a time.
            _, pullback = jax.vjp(perturbed_outputs, _after(of_clean, trainable))
        (of_perturbed,) = pullback(cotangents)
        return of_clean, of_perturbed, outcome

    def _gradients_of_replicas(
        self: Any, state: Any, data: PerturbedStep, key: Tensor
    ) -> tuple[list[Tensor], Outcome]:
        """The mean over the replicas, each on its share of the batch.

        Under `keras.distribution` a step is one program for all devices. In this part
        of it, each replica runs on its own; the axes of the mesh over which the model
        is sharded, if there are any, stay the compiler's.
        """
        axis, num_replicas, mesh = replicas()
        if num_replicas == 1:
            *gradients, outcome = self._gradients(state, data, key)
            return jax.tree.map(jax.numpy.add, *gradients), outcome
        size = num_samples(data.batch)
        # A batch that does not divide is on all devices as a whole. As many replicas
        # as divide it take a share each, and the others repeat what these do.
        num_shares = math.gcd(size, num_replicas)

        def of_one_replica(state: Any, data: PerturbedStep, key: Tensor) -> Any:
            index = jax.lax.axis_index(axis) % num_shares
            if num_shares < num_replicas:
                data = data._replace(batch=_share(data.batch, index, size, num_shares))
            *gradients, outcome = self._gradients(
                state, data, key, replica=index, num_replicas=num_shares
            )
            mean = functools.partial(_mean_over, axis)
            return (
                jax.tree.map(functools.partial(_mean_sum_over, axis), *gradients),
                outcome._replace(
                    terms=jax.tree.map(mean, outcome.terms),
                    penalty=mean(outcome.penalty),
                    state=[
                        new if new is old else mean(new)
                        for old, new in zip(state[1], outcome.state, strict=True)
                    ],
                ),
            )

        everywhere, split = P(), P(axis)
        gradients, outcome = jax.shard_map(
            of_one_replica,
            mesh=mesh,
            axis_names={axis},
            in_specs=(
                everywhere,
                PerturbedStep(
                    split if num_shares == num_replicas else everywhere,
                    everywhere,
                    everywhere,
                ),
                everywhere,
            ),
            out_specs=(
                everywhere,
                Outcome(everywhere, everywhere, split, split, everywhere),
            ),
            check_vma=False,
        )(state, data, key)
        if num_shares < num_replicas:
            outcome = outcome._replace(
                y_pred=jax.tree.map(lambda t: t[:size], outcome.y_pred),
                masks=jax.tree.map(lambda t: t[:size], outcome.masks),
            )
        return gradients, outcome

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
