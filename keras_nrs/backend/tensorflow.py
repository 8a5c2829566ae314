"""The training step and the random numbers on TensorFlow."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer

Tensor = Any


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = tf.cast(key, "int64")
        self._draws = 0

    # The noise of all weights is drawn at once.
    draws_whole = True

    def fold_in(self, index: Any) -> "RandomStream":
        """A stream that is independent of this one and those of other indices."""
        # Negative, so that it never equals a draw's.
        index = -1 - tf.cast(index, "int64")
        return RandomStream(tf.random.experimental.stateless_fold_in(self._key, index))

    def _next_key(self) -> Tensor:
        self._draws += 1
        # With a Python int it would return a key of 32 bits instead of 64.
        draws = tf.constant(self._draws, "int64")
        return tf.random.experimental.stateless_fold_in(self._key, draws)

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Standard normal numbers."""
        return tf.random.stateless_normal(shape, self._next_key(), dtype=dtype)

    def rademacher(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Signs, -1 or 1 with equal probability."""
        bits = tf.random.stateless_uniform(
            shape, self._next_key(), minval=0, maxval=2, dtype="int32"
        )
        return tf.cast(2 * bits - 1, dtype)

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        return tf.random.stateless_uniform(shape, self._next_key(), dtype=dtype)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of tensors."""
    compiled: Callable[..., Any] = tf.function(
        function, reduce_retracing=True, autograph=False
    )
    return compiled


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
        base._symbolic_build(data_batch=data)
        self.built = True
        key = self.seed_generator.next()
        state = [v.value for v in base.non_trainable_variables]
        perturb = True if self.interval == 1 else key[1] % self.interval == 0
        context = tf.distribute.get_replica_context()

        with tf.GradientTape() as tape:
            outcome = self._objective(
                [v.value for v in base.trainable_variables],
                state,
                [v.value for v in base.metrics_variables],
                data,
                eps=self.eps.value,
                alpha=self.alpha.value,
                key=key,
                replica=context.replica_id_in_sync_group if _num_replicas() > 1 else 0,
                perturb=perturb,
            )
            scaled = base.optimizer.scale_loss(outcome.terms.total)

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
        weights = base.trainable_weights
        base.optimizer.apply_gradients(
            zip(tape.gradient(scaled, weights), weights, strict=True)
        )
        return self._reducible(
            self._assign_outcome(
                outcome, data, weight=tf.cast(perturb, "int32"), unscaled=_unscaled
            )
        )

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
