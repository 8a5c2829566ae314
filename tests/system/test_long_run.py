"""Across modules: twenty thousand steps.

python -m pytest -m slow -s tests/system/test_long_run.py
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs

EPOCHS, STEPS, BATCH, INTERVAL = 20, 1000, 4, 2
TRACES = [0]


def note(tensor: Any, function: Callable[[Any], None]) -> None:
    """Call a function with the value of a tensor whenever a step computes it."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        jax.debug.callback(function, tensor)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.numpy_function(lambda value: function(value) or 0.0, [tensor], tf.float64)
    else:
        function(tensor.numpy())


class Noted(keras_nrs.perturbations.RelativeBall):
    """Keeps the beginning of each delta."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas = np.zeros((EPOCHS * STEPS // INTERVAL, 16), np.float32)
        self.num = 0

    def sample(self, weights: Any, eps: Any, rng: Any) -> list[Any]:
        deltas = super().sample(weights, eps, rng)
        note(keras.ops.reshape(deltas[0], (-1,))[:16], self._keep)
        return deltas

    def _keep(self, value: Any) -> None:
        self.deltas[self.num] = value
        self.num += 1


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class Traced(layers.Layer):
    """Notes when Python calls it: at each step on PyTorch, at each trace elsewhere."""

    def call(self, inputs: Any) -> Any:
        TRACES[0] += 1
        return inputs


def resident_bytes() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Watch(keras.callbacks.Callback):
    """Traces and memory after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[int] = []
        self.memory: list[int] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.traces.append(TRACES[0])
        self.memory.append(resident_bytes())


@pytest.mark.slow
def test_many_steps() -> None:
    """Nothing is traced again, memory is flat, and no perturbation comes twice."""
    TRACES[0] = 0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, 6)).astype("float32")
    y = rng.integers(0, 3, len(x))
    stack = [keras.Input((6,)), Traced(), layers.Dense(8, activation="relu")]
    stack += [layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(3)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"])
    perturbation = Noted()
    nrs = keras_nrs.wrap(
        model, eps=0.3, perturbation=perturbation, interval=INTERVAL, seed=0
    )
    watch = Watch()
    schedule = keras_nrs.callbacks.NRSSchedule(warmup_epochs=EPOCHS)
    first = keras.ops.convert_to_numpy(nrs.seed_generator.state).copy()
    nrs.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(x[:20], y[:20]),
        verbose=0,
        callbacks=[schedule, watch],
    )
    last = keras.ops.convert_to_numpy(nrs.seed_generator.state)
    steps = EPOCHS * STEPS
    assert (last[0], last[1] - first[1]) == (first[0], steps)
    assert perturbation.num == steps // INTERVAL
    # eps grows from epoch to epoch. Directions are of any eps.
    norms = np.linalg.norm(perturbation.deltas, axis=1, keepdims=True)
    assert len(np.unique(np.round(perturbation.deltas / norms, 5), axis=0)) == len(
        norms
    )
    if keras.config.backend() != "torch":
        assert watch.traces[-1] == watch.traces[0]
    growth = (watch.memory[-1] - watch.memory[4]) / 2**20
    print(
        f"{keras.config.backend()}: {steps} steps; {watch.traces[0]} calls of a layer "
        f"in the first epoch, {watch.traces[-1] - watch.traces[0]} in the others; "
        f"{growth:.1f} MiB more than after the fifth."
    )
    # Less than 100 bytes a step.
    assert growth * 2**20 < 100 * steps
