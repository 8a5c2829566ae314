"""The training step and the random numbers on TensorFlow."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Tensor = Any


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = tf.cast(key, "int64")
        self._draws = 0

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


def _unscaled(loss: Tensor) -> Tensor:
    """A loss without the 1 / replicas that Keras puts in under a strategy."""
    return loss * float(tf.distribute.get_strategy().num_replicas_in_sync)


class BackendTrainer:
    """Steps of an `NRSModel`, as `keras.Model` calls them on TensorFlow."""

    _perturbs = True

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
            return base.train_step(data) | self._tracker_logs()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        kwargs = self._call_kwargs(training=True)
        key = self.seed_generator.next()
        # Read before the clean pass advances the seeds: both passes must see the
        # same dropout masks.
        state = [tf.identity(v.value) for v in base.non_trainable_variables]
        perturb = True if self.interval == 1 else key[1] % self.interval == 0

        with tf.GradientTape() as tape:
            y_pred = base(x, **kwargs)
            self.built = True
            clean_loss = base._compute_loss(x, y, y_pred, sample_weight, training=True)
            penalty = sum(map(keras.ops.sum, base.losses))

            def perturbed_terms() -> tuple[Tensor, Tensor]:
                weights = [v.value for v in base.trainable_variables]
                deltas = self._sample(weights, self.eps.value, RandomStream(key))
                with self._perturbed_scope(weights, deltas, state):
                    perturbed = base(x, **kwargs)
                    loss = base._compute_loss(
                        x, y, perturbed, sample_weight, training=True
                    )
                    divergence = self._divergence(y, y_pred, perturbed, sample_weight)
                return tf.cast(divergence, clean_loss.dtype), loss

            if perturb is True:
                divergence, perturbed_loss = perturbed_terms()
            else:
                zero = tf.zeros((), clean_loss.dtype)
                divergence, perturbed_loss = tf.cond(
                    perturb, perturbed_terms, lambda: (zero, zero)
                )
            terms = self._terms(
                clean_loss,
                divergence,
                perturbed_loss,
                penalty=penalty,
                alpha=tf.cast(self.alpha.value, clean_loss.dtype),
            )
            total = terms.total
            if perturb is not True:
                total = tf.where(perturb, total, clean_loss)
            scaled = base.optimizer.scale_loss(total)

        weights = base.trainable_weights
        base.optimizer.apply_gradients(
            zip(tape.gradient(scaled, weights), weights, strict=True)
        )
        base._loss_tracker.update_state(
            _unscaled(total), sample_weight=self._batch_size(x)
        )
        self._update_trackers(
            terms._replace(
                divergence=_unscaled(divergence),
                perturbed_loss=_unscaled(perturbed_loss),
            ),
            data,
            weight=tf.cast(perturb, "int32"),
        )
        logs = base.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs | self._tracker_logs()

    def test_step(self: Any, data: Any) -> Any:
        return self.base_model.test_step(data)

    def predict_step(self: Any, data: Any) -> Any:
        return self.base_model.predict_step(data)
