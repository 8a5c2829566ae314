"""The training step on TensorFlow."""

import itertools
from collections.abc import Callable
from collections.abc import Generator
from typing import Any

import keras
import tensorflow as tf

from keras_nrs import keras_internals
from keras_nrs.step.outcomes import Outcome
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.trainers.trainer import Trainer

Tensor = Any


def _num_replicas() -> int:
    num_replicas: int = tf.distribute.get_strategy().num_replicas_in_sync
    return num_replicas


def _unscaled(loss: Tensor) -> Tensor:
    """A loss without the 1 / replicas that Keras puts in under a strategy."""
    return loss * float(_num_replicas())


def _mean_over_replicas(tensors: list[Tensor]) -> list[Tensor]:
    if _num_replicas() == 1:
        return tensors
    context = tf.distribute.get_replica_context()
    return [context.all_reduce("MEAN", tensor) for tensor in tensors]


def _differentiated(outputs: Any) -> list[Tensor]:
    """The outputs of passes, and the logits that losses take for some of them.

    Integers and booleans, as of an `argmax()`, have no gradient.
    """
    tensors = [t for t in tf.nest.flatten(outputs) if t is not None]
    tensors = [t for t in tensors if t.dtype.is_floating or t.dtype.is_complex]
    logits = map(keras_internals.tensorflow_logits, tensors)
    return tensors + [t for t in logits if t is not None]


def _without_optionals(spec: Any) -> Any:
    """The specification of a batch, `None` for an input that is missing in it."""
    return tf.nest.map_structure(
        lambda s: None if isinstance(s, tf.OptionalSpec) else s, spec
    )


def _as_tensor(data: Any) -> Tensor | None:
    return None if data is None else tf.convert_to_tensor(data)


def _added(first: Any, second: Any) -> Any:
    """The sum of two gradients, `None` if a weight has neither."""
    if first is None or second is None:
        return second if first is None else first
    return first + tf.convert_to_tensor(second)


class BackendTrainer(Trainer):
    """The steps of an `NRSModel`, as `keras.Model` calls them on TensorFlow."""

    # Which kind of step is traced or run: see `make_train_function()`.
    _perturbs = True

    def first_batch(self, iterator: Any, data_batch: Any) -> Any:
        """A batch with the shapes of the data.

        Keras reduces a first batch over all replicas, which several workers cannot do.
        The share of one replica has the same shapes.
        """
        if iterator is None or keras_internals.tensorflow_strategy(self.model) is None:
            return data_batch
        results = self.model.distribute_strategy.experimental_local_results
        for _, _, batches in iterator:
            return tf.nest.map_structure(lambda t: results(t)[0], next(batches))
        return data_batch

    def num_replicas(self) -> int:
        num_replicas: int = self.model.distribute_strategy.num_replicas_in_sync
        return num_replicas

    def make_train_function(self, make: Callable[[bool], None], force: bool) -> None:
        model = self.model
        if model.train_function is not None and not force:
            return
        # One graph for each kind of step. In one graph, with a conditional, the
        # optimizer of graphs may round the clean pass otherwise than in bare Keras.
        functions: dict[Any, Any] = {}

        def train_function(iterator: Any) -> Any:
            self._perturbs = self.needs_perturbed_pass()
            kind = self._perturbs, *(c.schedule for c in model.coefficients)
            is_new = kind not in functions
            if is_new:
                make(True)
                functions[kind] = model.train_function
                model.train_function = train_function
            try:
                if is_new:
                    iterator = self._build(iterator)
                return functions[kind](iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                raise
            except Exception:
                # A function that could not be traced does nothing at its next call.
                model.train_function = None
                raise

        model.train_function = train_function

    def _build(self, iterator: Any) -> Any:
        """Build what a new step needs, and return an iterator with the same batches.

        TensorFlow traces a function again that makes variables, in `init_scope()` too.
        """
        under_strategy = keras_internals.tensorflow_strategy(self.model) is not None
        if not self._perturbs or under_strategy:  # There Keras builds it.
            return iterator
        if isinstance(iterator, tf.data.Iterator):
            self.objective.build(_without_optionals(iterator.element_spec))
        elif isinstance(iterator, Generator):  # Of `train_on_batch()`.
            batch = next(iterator)
            tensors = tf.nest.map_structure(_as_tensor, batch, expand_composites=True)
            self.objective.build(tensors)
            return itertools.chain([batch], iterator)
        return iterator

    def train_step(self, data: Any) -> Any:
        base, model = self.base_model, self.model
        if self._perturbs:
            # Outside of the graph: if tracing fails, new variables have no values.
            with tf.init_scope():
                self.objective.build(data)
        # Only now is it known whether a model that was not built has weights.
        variables = self.objective.find_variables()
        if not (self._perturbs and variables.trainable):
            if self.options.scheme != "baseline":
                self.coefficients_in(model.seed_generator.next()[1])
            return self._reducible(base.train_step(data) | self.tracker_logs())
        key = model.seed_generator.next()
        eps, alpha = self.coefficients_in(key[1])
        state = [v.value for v in variables.non_trainable]
        context = tf.distribute.get_replica_context()
        inputs = StepInputs(
            state,
            [v.value for v in variables.metrics],
            data,
            eps,
            alpha,
            key,
            context.replica_id_in_sync_group if _num_replicas() > 1 else 0,
            loss_scale=base.optimizer.scale_loss(1.0),
        )
        weights = [v.value for v in variables.trainable]
        perturbs: Any = True
        if self.options.interval == 1:
            gradients, outcome = self._gradients(weights, inputs)
        else:
            perturbs = key[1] % self.options.interval == 0
            gradients, outcome = self._gradients_if(perturbs, weights, inputs)
        if _num_replicas() > 1:
            # Keras lets each replica keep the statistics of its own batches.
            outcome = self.with_mean_state(outcome, inputs, _mean_over_replicas)
        for variable, value in outcome.updates:
            variable.assign(value)
        self.update_metrics_of_loss(outcome, data)
        base.optimizer.apply_gradients(
            zip(map(self._summed, gradients), base.trainable_weights, strict=True)
        )
        weight = tf.cast(perturbs, "int32")
        return self._reducible(
            self.assign_outcome(outcome, data, weight=weight, unscaled=_unscaled)
        )

    def _summed(self, gradient: Any) -> Any:
        """A gradient with one row for each index.

        The gradients of embeddings have a row for each use of an index, in both passes,
        and Keras's optimizers take the rows for gradients of their own.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        if self.model.jit_compile:  # XLA has no tensors of unknown size.
            return tf.convert_to_tensor(gradient)
        indices, positions = tf.unique(gradient.indices)
        values = tf.math.unsorted_segment_sum(
            gradient.values, positions, tf.size(indices)
        )
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _gradients(
        self, weights: list[Tensor], inputs: StepInputs, perturbs: bool = True
    ) -> tuple[list[Tensor], Outcome]:
        """The gradients on one replica, times the optimizer's loss scale."""
        objective, scale = self.objective, self.base_model.optimizer.scale_loss
        batch = objective.split(inputs, perturbs=perturbs)
        if perturbs:
            # Keras divides its losses by the number of replicas, not those of groups.
            part = inputs._replace(loss_scale=inputs.loss_scale / _num_replicas())
            batch = self.with_directions(weights, part, batch, _mean_over_replicas)
        recomputes = self.options.memory_efficient and bool(self.options.signs)
        if perturbs and recomputes:
            # The values of now: the optimizer may assign before they are read again.
            weights = [tf.convert_to_tensor(weight) for weight in weights]
        if not (perturbs and recomputes):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outputs = None
                if perturbs:
                    outputs = objective.perturbed_outputs(weights, inputs, batch)
                passes = objective.passes(weights, inputs, batch, outputs)
                outcome = objective.outcome(weights, inputs, passes)
                scaled = scale(outcome.terms.total)
            return tape.gradient(scaled, weights), outcome
        # First the outputs of the perturbed pass alone, then all of the clean pass,
        # then the perturbed pass once more: activations of one pass at a time.
        outputs = objective.perturbed_outputs(weights, inputs, batch)
        tensors = _differentiated(outputs)
        with tf.GradientTape() as tape:
            tape.watch([weights, tensors])
            passes = objective.passes(weights, inputs, batch, outputs)
            outcome = objective.outcome(weights, inputs, passes)
            scaled = scale(outcome.terms.total)
        gradients, cotangents = tape.gradient(scaled, [weights, tensors])
        cotangents = [
            tf.zeros_like(t) if c is None else c
            for t, c in zip(tensors, cotangents, strict=True)
        ]
        of_clean = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        with tf.control_dependencies([g for g in of_clean if g is not None]):
            weights = [tf.identity(weight) for weight in weights]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs = objective.perturbed_outputs(weights, inputs, batch)
            tensors = _differentiated(outputs)
        of_perturbed = tape.gradient(tensors, weights, cotangents)
        return list(map(_added, of_clean, of_perturbed)), outcome

    def _gradients_if(
        self, perturbs: Tensor, weights: list[Tensor], inputs: StepInputs
    ) -> tuple[list[Tensor], Outcome]:
        """`_gradients()`, with the perturbed pass if a tensor is true.

        A conditional takes and gives tensors only. Variables, `None` and the state that
        no step changes go around it.
        """
        given = set(map(id, [*inputs.state, None]))

        def is_given(leaf: Any) -> bool:
            return id(leaf) in given or isinstance(leaf, keras.Variable)

        results: dict[bool, Any] = {}

        def run(perturbs: bool) -> list[Tensor]:
            gradients, outcome = self._gradients(weights, inputs, perturbs)
            dense = [
                tf.zeros_like(w) if g is None else tf.convert_to_tensor(g)
                for w, g in zip(weights, gradients, strict=True)
            ]
            results[perturbs] = gradients, (dense, outcome)
            leaves = tf.nest.flatten((dense, outcome))
            return [leaf for leaf in leaves if not is_given(leaf)]

        tensors = iter(tf.cond(perturbs, lambda: run(True), lambda: run(False)))
        of_branches = [gradients for gradients, _ in results.values()]
        _, result = next(iter(results.values()))
        leaves = [
            leaf if is_given(leaf) else next(tensors)
            for leaf in tf.nest.flatten(result)
        ]
        dense, outcome = tf.nest.pack_sequence_as(result, leaves)
        gradients = [
            None if all(g is None for g in of_each) else d
            for d, *of_each in zip(dense, *of_branches, strict=True)
        ]
        return gradients, outcome

    def test_step(self, data: Any) -> Any:
        return self._reducible(self.base_model.test_step(data))

    def predict_step(self, data: Any) -> Any:
        return self.base_model.predict_step(data)

    def _reducible(self, logs: Any) -> Any:
        """Logs in the shape that Keras reduces over the replicas of several workers.

        It takes the mean over the first axis, which scalars do not have.
        """
        strategy = self.model.distribute_strategy
        if not keras_internals.reduces_logs_of_tensorflow_workers(strategy):
            return logs
        return tf.nest.map_structure(lambda log: tf.reshape(log, (1,)), logs)
