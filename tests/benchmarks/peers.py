"""What else does two passes a step: SAM, and Equation 3 as one would write it at first.

Each `train_step()` follows Keras's guides on custom training steps for its backend. The
perturbations are as large as those that they are compared with; nothing else is tuned.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tests.benchmarks.networks import RADIUS


def _norm(tensors: Any) -> Any:
    return ops.sqrt(sum(ops.sum(ops.square(t)) for t in tensors))


def _divergence(y_pred: Any, perturbed: Any) -> Any:
    return keras.losses.kl_divergence(ops.softmax(y_pred), ops.softmax(perturbed))


class _Peer(keras.Model):
    """A model that trains another one in its own way."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model
        self.seeds = keras.random.SeedGenerator(0)
        self.compile(model.optimizer, model.loss)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def noise(self, weights: Any) -> list[Any]:
        """A random point at the distance RADIUS * norm(weights) from zero."""
        noise = [keras.random.normal(w.shape, seed=self.seeds) for w in weights]
        scale = RADIUS * _norm(weights) / _norm(noise)
        return [scale * g for g in noise]


class _JaxPeer(_Peer):
    def loss_of(self, trainable: Any, rest: Any, x: Any, y: Any) -> Any:
        y_pred, rest = self.stateless_call(trainable, rest, x, training=True)
        return self.compute_loss(x, y, y_pred), (y_pred, rest)

    def finish(self, state: Any, rest: Any, gradients: Any, loss: Any) -> Any:
        trainable, _, optimizer, metrics = state
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        with keras.StatelessScope(
            list(zip(self.metrics_variables, metrics, strict=True))
        ) as scope:
            self._loss_tracker.update_state(loss)
            logs = {"loss": self._loss_tracker.result()}
        metrics = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, rest, optimizer, metrics)


class JaxSAM(_JaxPeer):
    def train_step(self, state: Any, data: Any) -> Any:
        import jax

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        trainable, rest = state[:2]
        gradient = jax.value_and_grad(self.loss_of, has_aux=True)
        (loss, (_, new_rest)), g = gradient(trainable, rest, x, y)
        scale = RADIUS * _norm(trainable) / _norm(g)
        perturbed = [w + scale * d for w, d in zip(trainable, g, strict=True)]
        _, g = gradient(perturbed, rest, x, y)
        return self.finish(state, new_rest, g, loss)


class JaxEquation3(_JaxPeer):
    def train_step(self, state: Any, data: Any) -> Any:
        import jax

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        trainable, rest = state[:2]
        mapping = list(zip(self.non_trainable_variables, rest, strict=True))
        with keras.StatelessScope(mapping) as scope:
            noise = self.noise(trainable)
        drawn = scope.get_current_value(self.seeds.state)
        i = [v is self.seeds.state for v in self.non_trainable_variables].index(True)

        def objective(weights: Any) -> Any:
            loss, (y_pred, new_rest) = self.loss_of(weights, rest, x, y)
            moved = [w + d for w, d in zip(weights, noise, strict=True)]
            moved_loss, (moved_pred, _) = self.loss_of(moved, rest, x, y)
            divergence = ops.mean(_divergence(y_pred, moved_pred))
            return loss + divergence + moved_loss, new_rest

        (loss, new_rest), g = jax.value_and_grad(objective, has_aux=True)(trainable)
        new_rest = [*new_rest[:i], drawn, *new_rest[i + 1 :]]
        return self.finish(state, new_rest, g, loss)


class TensorFlowSAM(_Peer):
    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = [v.value for v in self.trainable_variables]
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        g = tape.gradient(loss, weights)
        scale = RADIUS * _norm(weights) / _norm(g)
        moves = [scale * d for d in g]
        for weight, move in zip(weights, moves, strict=True):
            weight.assign_add(move)
        with tf.GradientTape() as tape:
            moved_loss = self.compute_loss(x, y, self(x, training=True))
        g = tape.gradient(moved_loss, weights)
        for weight, move in zip(weights, moves, strict=True):
            weight.assign_sub(move)
        self.optimizer.apply(g, self.trainable_variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


class TensorFlowEquation3(_Peer):
    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = [v.value for v in self.trainable_variables]
        moves = self.noise(weights)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            for weight, move in zip(weights, moves, strict=True):
                weight.assign_add(move)
            moved_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
            loss += self.compute_loss(x, y, moved_pred)
            loss += ops.mean(_divergence(y_pred, moved_pred))
        g = tape.gradient(loss, weights)
        for weight, move in zip(weights, moves, strict=True):
            weight.assign_sub(move)
        self.optimizer.apply(g, self.trainable_variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


class TorchSAM(_Peer):
    def train_step(self, data: Any) -> Any:
        import torch

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = [v.value for v in self.trainable_variables]
        self.zero_grad()
        loss = self.compute_loss(x, y, self(x, training=True))
        loss.backward()
        with torch.no_grad():
            g = [w.grad for w in weights]
            scale = RADIUS * _norm(weights) / _norm(g)
            moves = [scale * d for d in g]
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
        self.zero_grad()
        self.compute_loss(x, y, self(x, training=True)).backward()
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.sub_(move)
            self.optimizer.apply([w.grad for w in weights], self.trainable_variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


class TorchEquation3(_Peer):
    """By `stateless_call()`: autograd does not survive an assignment in between."""

    def train_step(self, data: Any) -> Any:
        import torch

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = [v.value for v in self.trainable_variables]
        rest = [v.value for v in self.non_trainable_variables]
        with torch.no_grad():
            moves = self.noise(weights)
        self.zero_grad()
        y_pred = self(x, training=True)
        moved = [w + d for w, d in zip(weights, moves, strict=True)]
        moved_pred, _ = self.stateless_call(moved, rest, x, training=True)
        loss = self.compute_loss(x, y, y_pred) + self.compute_loss(x, y, moved_pred)
        loss = loss + ops.mean(_divergence(y_pred, moved_pred))
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([w.grad for w in weights], self.trainable_variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


def optax_sam(
    model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int
) -> Callable[[], None]:
    """An epoch with `optax.contrib.sam` in a loop without Keras's `fit()`."""
    import jax
    import optax

    optimizer = optax.contrib.sam(
        optax.sgd(0.01, momentum=0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS)),
        opaque_mode=True,
    )
    weights = [v.value + 0 for v in model.trainable_variables]
    rest = [v.value + 0 for v in model.non_trainable_variables]
    state = [weights, rest, optimizer.init(weights)]

    def loss(weights: Any, rest: Any, x: Any, y: Any) -> Any:
        y_pred, rest = model.stateless_call(weights, rest, x, training=True)
        return model.compute_loss(x, y, y_pred), rest

    def step(weights: Any, rest: Any, optimizer_state: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(loss, has_aux=True)
        g, new_rest = gradient(weights, rest, x, y)
        updates, optimizer_state = optimizer.update(
            g,
            optimizer_state,
            weights,
            grad_fn=lambda weights, _: gradient(weights, rest, x, y)[0],
        )
        return optax.apply_updates(weights, updates), new_rest, optimizer_state

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))

    def run() -> None:
        for start in range(0, len(x), batch_size):
            batch = slice(start, start + batch_size)
            state[:] = compiled(*state, x[batch], y[batch])
        jax.block_until_ready(state)

    return run


SAM = {"jax": JaxSAM, "tensorflow": TensorFlowSAM, "torch": TorchSAM}
EQUATION_3 = {
    "jax": JaxEquation3,
    "tensorflow": TensorFlowEquation3,
    "torch": TorchEquation3,
}
