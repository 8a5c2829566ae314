"""The training step on TensorFlow."""

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer

from keras_nrs.step.groups import Outcome
from keras_nrs.step.groups import StepInputs

Tensor = Any


def _num_replicas() -> int:
    num_replicas: int = tf.distribute.get_strategy().num_replicas_in_sync
    return num_replicas


def _unscaled(loss: Tensor) -> Tensor:
    """A loss without the 1 / replicas that Keras puts in under a strategy."""
    return loss * float(_num_replicas())


class BackendTrainer:
    """Steps of an `NRSModel`, as `keras.Model` calls them on TensorFlow."""

    _perturbs = True
    # TensorFlow splits batches among devices by itself.
    _loop_over_batches = staticmethod(contextlib.nullcontext)

    @staticmethod
    def _scope_of(model: Any) -> AbstractContextManager[Any]:
        """The scope of the strategy that the model was made under."""
        scope: AbstractContextManager[Any] = model.distribute_strategy.scope()
        return scope

    def process_index(self: Any) -> int:
        """The index of this worker among all."""
        cluster = self.distribute_strategy.cluster_resolver
        return 0 if cluster is None else cluster.task_id or 0

    @staticmethod
    def values_of_processes(values: list[int]) -> list[list[int]]:
        """These values. TensorFlow's own checks find workers that disagree."""
        return [values]

    def _maybe_symbolic_build(
        self: Any, iterator: Any = None, data_batch: Any = None
    ) -> None:
        # Keras reduces a first batch over all replicas, which several workers cannot
        # do. One replica's share of it has the shapes as well.
        if iterator is not None and self._distribute_strategy is not None:
            strategy = self.distribute_strategy
            for _, _, batches in iterator:
                data_batch = tf.nest.map_structure(
                    lambda t: strategy.experimental_local_results(t)[0], next(batches)
                )
                break
        super()._maybe_symbolic_build(data_batch=data_batch)  # type: ignore[misc]

    def make_train_function(self: Any, force: bool = False) -> None:
        if self.train_function is not None and not force:
            return
        # Two graphs, traced when first called. In one graph, with a conditional, the
        # optimizer of graphs may round the clean pass otherwise than in bare Keras.
        functions = {}
        for perturbs in (True, False):
            super().make_train_function(force=True)  # type: ignore[misc]
            functions[perturbs] = self.train_function

        def train_function(iterator: Any) -> Any:
            self._perturbs = self._perturbed_pass_matters()
            return functions[self._perturbs](iterator)

        self.train_function = train_function

    def train_step(self: Any, data: Any) -> dict[str, Tensor]:
        base = self.base_model
        if not self._perturbs:
            if self.scheme != "baseline":
                self.seed_generator.next()
            return self._reducible(base.train_step(data) | self._tracker_logs())
        self._symbolic_build_of_base(data)
        self.built = True
        key = self.seed_generator.next()
        state = [v.value for v in base.non_trainable_variables]
        context = tf.distribute.get_replica_context()
        inputs = StepInputs(
            state,
            [v.value for v in base.metrics_variables],
            data,
            self.eps.value,
            self.alpha.value,
            key,
            context.replica_id_in_sync_group if _num_replicas() > 1 else 0,
        )
        weights = [v.value for v in base.trainable_variables]
        if self.interval == 1:
            perturb = True
            gradients, outcome = self._gradients(weights, inputs)
        else:
            perturb = key[1] % self.interval == 0
            gradients, outcome = self._gradients_if(perturb, weights, inputs)

        if _num_replicas() > 1:
            # Keras lets each replica keep the statistics of its own batches.
            outcome = outcome._replace(
                state=[
                    context.all_reduce("MEAN", new)
                    if new is not old and new.dtype.is_floating
                    else new
                    for new, old in zip(outcome.state, state, strict=True)
                ]
            )
        base.optimizer.apply_gradients(
            zip(gradients, base.trainable_weights, strict=True)
        )
        return self._reducible(
            self._assign_outcome(
                outcome, data, weight=tf.cast(perturb, "int32"), unscaled=_unscaled
            )
        )

    def _gradients(
        self: Any, weights: list[Tensor], inputs: StepInputs, perturb: bool = True
    ) -> tuple[list[Tensor], Outcome]:
        """The gradients on one replica, scaled by the optimizer's loss scale."""
        objective = functools.partial(self._objective, weights, inputs, perturb=perturb)
        scale = self.base_model.optimizer.scale_loss
        if not (perturb and self.memory_efficient):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outcome = objective()
                scaled = scale(outcome.terms.total)
            return tape.gradient(scaled, weights), outcome
        # First the outputs of the perturbed pass alone, then all of the clean pass,
        # then the perturbed pass once more: activations of one pass at a time.
        parts = self._parts(inputs)
        outputs = self._perturbed_outputs(weights, inputs, parts)
        tensors = [t for t in tf.nest.flatten(outputs) if t is not None]
        with tf.GradientTape() as tape:
            tape.watch([weights, tensors])
            outcome = objective(perturbed_outputs=outputs)
            scaled = scale(outcome.terms.total)
        zero = tf.UnconnectedGradients.ZERO
        gradients, cotangents = tape.gradient(
            scaled, [weights, tensors], unconnected_gradients=zero
        )
        with tf.control_dependencies(map(tf.convert_to_tensor, gradients)):
            weights = [tf.identity(weight) for weight in weights]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs = self._perturbed_outputs(weights, inputs, parts)
            tensors = [t for t in tf.nest.flatten(outputs) if t is not None]
        of_perturbed = tape.gradient(
            tensors, weights, cotangents, unconnected_gradients=zero
        )
        return [
            tf.convert_to_tensor(first) + tf.convert_to_tensor(second)
            for first, second in zip(gradients, of_perturbed, strict=True)
        ], outcome

    def _gradients_if(
        self: Any, perturb: Tensor, weights: list[Tensor], inputs: StepInputs
    ) -> tuple[list[Tensor], Outcome]:
        """`_gradients()`, with the perturbed pass if a tensor is true.

        A conditional takes and gives tensors only. What is none, and the state that no
        step changes, goes around it.
        """
        is_given = set(map(id, [*inputs.state, None]))
        results: dict[bool, Any] = {}

        def run(perturb: bool) -> list[Tensor]:
            gradients, outcome = self._gradients(weights, inputs, perturb)
            dense = [
                tf.zeros_like(w) if g is None else tf.convert_to_tensor(g)
                for w, g in zip(weights, gradients, strict=True)
            ]
            results[perturb] = gradients, (dense, outcome)
            leaves = tf.nest.flatten((dense, outcome))
            return [leaf for leaf in leaves if id(leaf) not in is_given]

        tensors = iter(tf.cond(perturb, lambda: run(True), lambda: run(False)))
        of_branches = [gradients for gradients, _ in results.values()]
        _, result = next(iter(results.values()))
        leaves = [
            leaf if id(leaf) in is_given else next(tensors)
            for leaf in tf.nest.flatten(result)
        ]
        dense, outcome = tf.nest.pack_sequence_as(result, leaves)
        gradients = [
            None if all(g is None for g in of_each) else d
            for d, *of_each in zip(dense, *of_branches, strict=True)
        ]
        return gradients, outcome

    def test_step(self: Any, data: Any) -> Any:
        return self._reducible(self.base_model.test_step(data))

    def _reducible(self: Any, logs: Any) -> Any:
        """Logs in the shape that Keras reduces over the replicas of several workers.

        It takes the mean over the first axis, which scalars do not have.
        """
        strategy = self.distribute_strategy
        if not keras_trainer._collective_all_reduce_multi_worker(strategy):
            return logs
        return tf.nest.map_structure(lambda log: tf.reshape(log, (1,)), logs)

    def predict_step(self: Any, data: Any) -> Any:
        return self.base_model.predict_step(data)
