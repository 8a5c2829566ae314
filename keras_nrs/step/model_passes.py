"""The passes of a training step through the base model, on groups of a batch."""

import functools
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
from keras_nrs.backend import random_state
from keras_nrs.backend import restored_random_state
from keras_nrs.backend import set_random_state
from keras_nrs.embeddings import readers
from keras_nrs.perturbations.row_noise import RowDelta
from keras_nrs.stateless import ModelVariables
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
from keras_nrs.step.options import StepOptions
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Microbatch
from keras_nrs.step.outcomes import Passes
from keras_nrs.step.outcomes import PerturbedPass
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.step.outcomes import joined_passes
from keras_nrs.step.sample_dependence import layer_losses_are_sums

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
        random_state: That of the backend's global generators.
        carried: The updates of the passes at theta that have been run already, with
            which those of the other groups begin.
    """

    microbatches: list[Microbatch]
    order: Tensor | None
    perturbed_share: Any
    host_state: HostRandomState
    random_state: Any
    carried: Sequence[Update] = ()


class ModelPasses:
    """The passes through a model on the batch of one replica.

    Nothing is assigned. `split()` makes `perturbations_per_replica` groups of the
    batch, each with a delta, dropout masks and batch moments of its own: a replica with
    two groups computes the outputs that two replicas would. Samples without a perturbed
    pass are groups too, so that both passes have the same masks and moments in the
    others.

    Args:
        base_model: The user's own model.
        options: The options of `wrap()`.
    """

    # Those of the base model in this step, which `find_variables()` has found.
    variables: ModelVariables

    def __init__(self, base_model: keras.Model, options: StepOptions) -> None:
        self.base_model = base_model
        self.options = options

    def find_variables(self) -> ModelVariables:
        """The variables of the base model. Call this first in each step."""
        self.variables = ModelVariables.of(self.base_model)
        return self.variables

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
            keep_whole=not self.variables.non_trainable,
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
        states = host_random_state(), random_state(inputs.key)
        return SplitBatch(microbatches, order, share, *states)

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
        weights = set(map(id, self.base_model.weights))
        stride = ops.convert_to_tensor([SEED_STRIDE, 0], "int32")
        return [
            None if id(v) in weights else ops.cast(index * stride, s.dtype)
            for v, s in zip(self.variables.non_trainable, state, strict=True)
        ]

    # The phase at theta + delta.

    def perturbed_outputs(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        *,
        recompute: Callable[[Pass, list[Tensor]], Any] | None = None,
    ) -> list[list[PerturbedPass | None]]:
        """The passes that follow the first one: for each sign of delta, of each group.

        `None` stands for a group without that pass. The list is empty where the first
        pass is at theta + delta and the only one.

        Args:
            weights: Values of the base model's trainable variables. A value whose rows
                were looked up is replaced by the one that `take_rows()` gave.
            inputs: The other inputs of the step.
            batch: The batch of `inputs`, split.
            recompute: A function that runs a pass at these weights and keeps no
                activations of it. By default a pass runs as it is.
        """
        return [
            self._perturbed_outputs(sign, weights, inputs, batch, recompute)
            for sign in self.options.signs
        ]

    def _perturbed_outputs(
        self,
        sign: int,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        recompute: Callable[[Pass, list[Tensor]], Any] | None,
    ) -> list[PerturbedPass | None]:
        """The passes of all groups at theta + delta, or at theta - delta."""
        outputs: list[PerturbedPass | None] = []
        carried: list[Update] = []
        num_passes = sum(m.group.is_perturbed for m in batch.microbatches)
        num_passes *= len(self.options.signs)
        with restored_random_state(inputs.key), drawing_from(batch.host_state):
            set_random_state(inputs.key, batch.random_state)
            for microbatch in batch.microbatches:
                if not microbatch.group.is_perturbed:
                    outputs.append(None)
                    continue

                def run(
                    weights: list[Tensor],
                    microbatch: Microbatch = microbatch,
                    carried: list[Update] = carried,
                ) -> Any:
                    deltas = self.draw(
                        weights,
                        inputs,
                        microbatch.stream,
                        microbatch.gradients,
                        sign=sign,
                    )
                    values = self._perturbed_weights(
                        self.averaging_overwrites(weights, num_passes), deltas
                    )
                    passed, tables = self._perturbed_pass(
                        values, inputs, microbatch, carried
                    )
                    for i, table in tables.items():
                        weights[i] = table
                    return passed

                passed = recompute(run, weights) if recompute else run(weights)
                output, carried = passed
                outputs.append(output)
        return outputs

    @not_in_graphs
    def draw(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        stream: Any,
        gradients: list[Tensor] | None = None,
        *,
        sign: Any = 1,
    ) -> list[Any]:
        """The delta of a stream: a constant, `None` for variables without one."""
        if self.options.antithetic is True:
            stream, sign = stream // 2, 1 - 2 * (stream % 2)
        deltas = perturbations.sample_deltas(
            self.options.perturbation,
            self.base_model,
            [ops.stop_gradient(w) for w in weights],
            inputs.eps,
            RandomStream(inputs.key).fold_in(stream),
            gradients,
            readers(self.base_model),
        )
        return [d if d is None else _signed(d, sign) for d in deltas]

    def averaging_overwrites(
        self, weights: list[Tensor], num_passes: int
    ) -> list[Tensor]:
        """The same weights, for each of several passes whose gradients are summed.

        The gradients of float8's scales are their new values. Not their sum but their
        mean over the passes is wanted.
        """
        if num_passes == 1:
            return weights
        return [
            ops.stop_gradient(w) + (w - ops.stop_gradient(w)) / num_passes
            if v.overwrite_with_gradient
            else w
            for v, w in zip(self.variables.trainable, weights, strict=True)
        ]

    def _perturbed_weights(self, weights: list[Tensor], deltas: list[Any]) -> list[Any]:
        if self.options.scheme == "nrs" or not self.options.runs_at_theta:
            # Gradients of float8's scales are their new values: the first pass's count.
            weights = [
                ops.stop_gradient(w) if v.overwrite_with_gradient else w
                for v, w in zip(self.variables.trainable, weights, strict=True)
            ]
        return perturbations.add_deltas(weights, deltas)

    def _perturbed_pass(
        self,
        weights: list[Any],
        inputs: StepInputs,
        microbatch: Microbatch,
        carried: list[Update],
    ) -> tuple[tuple[PerturbedPass, list[Update]], dict[int, Tensor]]:
        """The pass at these weights on one group, and the updates to carry on.

        The second result has the values of tables, by their position, that the next
        pass reads.
        """
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch.perturbed_data)
        with self._scope(weights, inputs, microbatch.state, carried) as scope:
            y_pred = stateless.call(base, x, training=True)
            losses = stateless.added_losses(base, scope)
        tables = {
            i: scope.tables[id(variable)].value
            for i, variable in enumerate(self.variables.trainable)
            if id(variable) in scope.tables
        }
        passed = PerturbedPass(y_pred, losses), self._carried(carried, scope)
        return passed, tables

    def _scope(
        self,
        weights: list[Any],
        inputs: StepInputs,
        state: list[Tensor],
        carried: Sequence[Update] = (),
    ) -> stateless.PassScope:
        return stateless.scope(
            self.base_model,
            weights,
            state,
            inputs.metrics,
            carried,
            variables=self.variables,
        )

    def _carried(
        self, carried: Sequence[Update], scope: stateless.PassScope
    ) -> list[Update]:
        """The values with which the next group of a batch begins.

        They are those of metrics and of random generators that are not the base
        model's, as Keras's global one: each group goes on with them.
        """
        trainable, non_trainable, of_metrics = self.variables
        own = set(map(id, [*trainable, *non_trainable]))
        metrics = set(map(id, of_metrics))
        updates = {id(variable): (variable, value) for variable, value in carried}
        updates |= scope.updates
        return [
            (variable, value)
            for key, (variable, value) in updates.items()
            if key in metrics
            or (key not in own and keras_internals.is_random_state(variable))
        ]

    # The first pass: at theta, or the one of `scheme="rpr"` at theta + delta.

    def passes(
        self,
        weights: list[Tensor],
        inputs: StepInputs,
        batch: SplitBatch,
        perturbed_outputs: list[list[PerturbedPass | None]] | None,
    ) -> Passes:
        """All passes on the batch of a replica, given those that follow the first one.

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
        is_at_theta = self.options.runs_at_theta or perturbed_outputs is None
        cleans: dict[int, CleanPass] = {}
        carried = batch.carried
        for i in indices:
            microbatch = microbatches[i]
            clean, at = microbatch.clean, weights
            if not is_at_theta:
                deltas = self.draw(weights, inputs, microbatch.stream)
                at = perturbations.add_deltas(weights, deltas)
            if clean is None:
                clean, carried = self._clean_pass(at, inputs, microbatch, carried)
            cleans[i] = clean
        is_split = len(microbatches) > 1 or share is not None or inputs.num_replicas > 1
        are_sums: list[bool] = []
        if cleans[0].layer_losses and is_split:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(inputs.batch)
            are_sums = layer_losses_are_sums(self.base_model, x)
        joined = joined_passes(
            [cleans[i] for i in range(len(microbatches))],
            perturbed_outputs,
            [microbatch.group for microbatch in microbatches],
            order=batch.order,
            perturbed_share=share,
            num_replicas=inputs.num_replicas,
            are_sums=are_sums,
        )
        return joined._replace(gradients=microbatches[0].gradients)

    def _clean_pass(
        self,
        weights: list[Any],
        inputs: StepInputs,
        microbatch: Microbatch,
        carried: Sequence[Update],
    ) -> tuple[CleanPass, list[Update]]:
        """The first pass on one group, and the updates to carry on."""
        base = self.base_model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch.data)
        with self._scope(weights, inputs, microbatch.state, carried) as scope:
            variables = self.variables.non_trainable
            before = list(map(scope.get_current_value, variables))
            y_pred = stateless.call(base, x, training=True)
            losses = stateless.added_losses(base, scope)
            after = list(map(scope.get_current_value, variables))
        # Without the group's offset, so that all groups advance one shared seed.
        state = [
            given if new is old else new if offset is None else new - offset
            for given, old, new, offset in zip(
                inputs.state, before, after, microbatch.offsets, strict=True
            )
        ]
        masks = tree.map_structure(keras_internals.get_keras_mask, y_pred)
        known = set(map(id, variables))
        updates = [update for key, update in scope.updates.items() if key not in known]
        clean = CleanPass(y_pred, masks, losses, state, updates)
        return clean, self._carried(carried, scope)


def _signed(delta: Any, sign: Any) -> Any:
    """delta, or its negative."""
    if isinstance(delta, RowDelta):
        return delta.mapped(functools.partial(_signed, sign=sign))
    if isinstance(sign, int):
        return delta if sign > 0 else -delta
    return ops.cast(sign, delta.dtype) * delta
