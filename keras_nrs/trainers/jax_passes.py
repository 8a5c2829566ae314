"""The passes of a training step on JAX: on one device, or on several replicas.

Both classes have the same methods. Their gradients are in copies of the weights, one
for each replica, so that they stay apart until `summed()`.
"""

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from keras_nrs.step.batch_objective import BatchObjective
from keras_nrs.step.groups import num_samples
from keras_nrs.step.host_random import host_random_state
from keras_nrs.step.model_passes import SplitBatch
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Passes
from keras_nrs.step.outcomes import StepInputs

Tensor = Any
# Values of variables by their position.
Tables = dict[int, Tensor]


class PassesOnOneDevice:
    """The passes on a batch of one device."""

    def __init__(self, objective: BatchObjective, inputs: StepInputs) -> None:
        self._objective = objective
        self._inputs = inputs
        self._batch = objective.split(inputs)

    def copies(self, weights: list[Tensor]) -> list[Tensor]:
        """The copies of these weights in which gradients are taken."""
        return weights

    def find_directions(self, copies: list[Tensor]) -> None:
        """Find the gradients at theta on which the deltas depend, if any."""
        self._batch = self._objective.with_directions(copies, self._inputs, self._batch)

    def perturbed_outputs(
        self, copies: list[Tensor], after: list[Tensor] | None = None
    ) -> tuple[Any, Tables]:
        """The passes at theta + delta, run after these tensors have been computed.

        And the tables of which they looked up rows. The gradient of a table that comes
        back through these gets the rows' gradients in place.
        """
        weights = _after_tensors(after or [], copies)
        return _with_tables(
            self._objective.perturbed_outputs, weights, self._inputs, self._batch
        )

    def passes(self, copies: list[Tensor], perturbed_outputs: Any) -> Passes:
        """Both passes on the batch, given those at theta + delta."""
        return self._objective.passes(
            copies, self._inputs, self._batch, perturbed_outputs
        )

    def summed(self, *gradients: list[Tensor | None]) -> list[Tensor]:
        """The sum of gradients in the copies, without those that are `None`."""
        return list(map(_sum, zip(*gradients, strict=True)))


class PassesOnReplicas:
    """The passes on the batches of several replicas, each on its share.

    Under `keras.distribution` a step is one program for all devices. In the passes,
    each replica runs on its own; the axes of the mesh over which the model is sharded,
    if there are any, stay the compiler's.

    A batch that does not divide is on all devices as a whole. The largest number of
    replicas that divides it takes a share each; the others repeat these.

    Args:
        objective: Equation 3.
        inputs: The inputs of the step, with the batch of all replicas.
        axis: The axis of the mesh over which batches are split.
        mesh: The mesh.
    """

    def __init__(
        self, objective: BatchObjective, inputs: StepInputs, axis: str, mesh: Any
    ) -> None:
        self._objective = objective
        self._inputs = inputs
        self._axis = axis
        self._mesh = mesh
        self._num_replicas = mesh.shape[axis]
        self._size = num_samples(inputs.batch)
        self._num_shares = math.gcd(self._size, self._num_replicas)
        self._host_state = host_random_state()
        # For each group: the gradients, and the pass at theta.
        self._directions: list[tuple[Any, Any]] = []

    def copies(self, weights: list[Tensor]) -> list[Tensor]:
        """The copies of these weights in which gradients are taken."""
        return [
            jax.numpy.broadcast_to(w, (self._num_replicas, *w.shape)) for w in weights
        ]

    def find_directions(self, copies: list[Tensor]) -> None:
        """Find the gradients at theta on which the deltas depend, if any."""
        if not self._objective.options.perturbation.needs_gradients:
            return

        def run(
            weights: list[Tensor], inputs: StepInputs, batch: SplitBatch, _: Any
        ) -> Any:
            batch = self._objective.with_directions(weights, inputs, batch)
            directions = [(m.gradients, m.clean) for m in batch.microbatches]
            if self._objective.options.sync_perturbation:
                directions = [(jax.tree.map(self._mean, g), c) for g, c in directions]
            return _stacked(directions)

        self._directions = self._on_replicas(run, P(self._axis), copies, [])

    def perturbed_outputs(
        self, copies: list[Tensor], after: list[Tensor] | None = None
    ) -> tuple[Any, Tables]:
        """The passes at theta + delta, and tables, as on one device.

        Their leaves have an axis of replicas in front.
        """

        def run(
            weights: list[Tensor],
            inputs: StepInputs,
            batch: SplitBatch,
            after: list[Tensor],
        ) -> Any:
            weights = _after_tensors(after, weights)
            return _stacked(
                _with_tables(self._objective.perturbed_outputs, weights, inputs, batch)
            )

        return self._on_replicas(run, P(self._axis), copies, after or [])

    def passes(self, copies: list[Tensor], perturbed_outputs: Any) -> Passes:
        """Both passes on the batch, given those at theta + delta."""

        def run(
            weights: list[Tensor],
            inputs: StepInputs,
            batch: SplitBatch,
            outputs: Any,
        ) -> Passes:
            passes = self._objective.passes(weights, inputs, batch, outputs)
            clean = passes.clean._replace(
                layer_losses=list(map(self._mean, passes.clean.layer_losses)),
                state=[
                    new if new is old else self._mean(new)
                    for old, new in zip(inputs.state, passes.clean.state, strict=True)
                ],
                # As in plain Keras on JAX, no other assignment is kept.
                updates=[],
            )
            return passes._replace(
                clean=clean,
                perturbed_losses=jax.tree.map(self._mean, passes.perturbed_losses),
                gradients=jax.tree.map(self._mean, passes.gradients),
            )

        everywhere, split = P(), P(self._axis)
        specs = Passes(
            CleanPass(split, split, everywhere, everywhere, everywhere),
            split,
            split,
            everywhere,
            everywhere,
            everywhere,
        )
        passes = self._on_replicas(run, specs, copies, perturbed_outputs)
        if self._num_shares == self._num_replicas:
            return passes
        # Without the repeated shares.
        clean = passes.clean
        y_pred, masks, compared, perturbed = jax.tree.map(
            lambda t: t[: self._size],
            (clean.y_pred, clean.masks, passes.compared, passes.perturbed),
        )
        return passes._replace(
            clean=clean._replace(y_pred=y_pred, masks=masks),
            compared=compared,
            perturbed=perturbed,
        )

    def summed(self, *gradients: list[Tensor | None]) -> list[Tensor]:
        """The sum over all replicas of gradients in the copies, as on one device."""

        def run(gradients: tuple[list[Tensor], ...]) -> list[Tensor]:
            return [
                _sum_over(self._axis, [g[0] for g in of_weight if g is not None])
                for of_weight in zip(*gradients, strict=True)
            ]

        summed: list[Tensor] = jax.shard_map(
            run,
            mesh=self._mesh,
            axis_names={self._axis},
            in_specs=P(self._axis),
            out_specs=P(),
            check_vma=False,
        )(gradients)
        return summed

    def _on_replicas(
        self,
        run: Callable[..., Any],
        out_specs: Any,
        copies: list[Tensor],
        stacked: Any,
    ) -> Any:
        """Run a function of weights, inputs, their split batch, and another argument.

        Args:
            run: The function.
            out_specs: The parts of its outputs that replicas return.
            copies: The weights.
            stacked: The other argument, with an axis of replicas in front.
        """
        everywhere, split = P(), P(self._axis)

        def of_one_replica(
            copies: list[Tensor], inputs: StepInputs, stacked: Any
        ) -> Any:
            directions, argument = jax.tree.map(lambda t: t[0], stacked)
            index = jax.lax.axis_index(self._axis) % self._num_shares
            batch = inputs.batch
            if self._num_shares < self._num_replicas:
                batch = _share(batch, index, self._size, self._num_shares)
            inputs = inputs._replace(
                batch=batch, replica=index, num_replicas=self._num_shares
            )
            weights = [copy[0] for copy in copies]
            weights = self._objective.averaging_overwrites(weights, self._num_replicas)
            batch = self._objective.split(inputs)
            microbatches = batch.microbatches
            if directions:
                microbatches = [
                    microbatch._replace(gradients=gradients, clean=clean)
                    for microbatch, (gradients, clean) in zip(
                        microbatches, directions, strict=True
                    )
                ]
            batch = batch._replace(
                host_state=self._host_state, microbatches=microbatches
            )
            return run(weights, inputs, batch, argument)

        divides = self._num_shares == self._num_replicas
        specs = StepInputs(
            state=everywhere,
            metrics=everywhere,
            batch=split if divides else everywhere,
            eps=everywhere,
            alpha=everywhere,
            key=everywhere,
            replica=everywhere,
            num_replicas=everywhere,
            loss_scale=everywhere,
        )
        return jax.shard_map(
            of_one_replica,
            mesh=self._mesh,
            axis_names={self._axis},
            in_specs=(split, specs, split),
            out_specs=out_specs,
            check_vma=False,
        )(copies, self._inputs, (self._directions, stacked))

    def _mean(self, tensor: Tensor) -> Tensor:
        """The mean over replicas; of counters and seeds, which are equal, the value."""
        if jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
            return jax.lax.pmean(tensor, self._axis)
        if tensor.dtype == bool:
            return jax.lax.pmax(tensor.astype("int32"), self._axis) > 0
        return jax.lax.pmax(tensor, self._axis)


def _stacked(structure: Any) -> Any:
    return jax.tree.map(lambda t: t[None], structure)


def _with_tables(
    run: Callable[..., Any], weights: list[Tensor], *arguments: Any
) -> tuple[Any, Tables]:
    """The outputs of a function of weights, and the weights that it replaced."""
    given = list(weights)
    outputs = run(given, *arguments)
    pairs = zip(given, weights, strict=True)
    return outputs, {i: new for i, (new, old) in enumerate(pairs) if new is not old}


def _sum(tensors: Sequence[Tensor | None]) -> Tensor:
    return functools.reduce(jax.numpy.add, [t for t in tensors if t is not None])


def _sum_over(axis: str, gradients: Sequence[Tensor]) -> Tensor:
    """The sum over replicas of several gradients.

    Gradients of matrices are transposed products. XLA's CPU compiler would fold the
    transposition into the products, which then miss its fast kernels. So it is undone
    here, and done after the sums, where Keras's own step has it.
    """
    if gradients[0].ndim != 2:
        return jax.lax.psum(_sum(gradients), axis)
    return jax.lax.psum(_sum([g.T for g in gradients]), axis).T


def _after_tensors(tensors: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The values, for use after the tensors have been computed.

    XLA's CPU compiler drops barriers before it chooses an order. It does not see
    through this arithmetic, which adds 0 unless a tensor is not a number.
    """
    if not tensors:
        return values
    probe = jax.numpy.zeros(())
    for tensor in tensors:
        if tensor.size:
            probe += tensor[(0,) * tensor.ndim].astype("float32")
    zero = jax.numpy.where(probe == probe, 0.0, jax.numpy.nan)
    return [value + zero.astype(value.dtype) for value in values]


def _share(batch: Any, index: Tensor, size: int, num_shares: int) -> Any:
    """Share `index` of a batch that is cut into equal ones."""
    length = size // num_shares
    return jax.tree.map(
        lambda t: jax.lax.dynamic_slice_in_dim(t, index * length, length), batch
    )
