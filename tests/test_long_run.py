"""Twenty thousand steps: `python -m pytest -m slow -s tests/test_long_run.py`."""

import gc
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function

EPOCHS, STEPS, BATCH = 20, 1000, 4
TRACES = [0]


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
    """Seed states at each step; traces and memory after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.states = np.zeros((EPOCHS * STEPS, 2), np.int64)
        self.traces: list[int] = []
        self.memory: list[int] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        state = self.model.seed_generator.state
        if keras.config.backend() != "jax":  # Where the state is in the compiled step.
            self.states[self.steps] = keras.ops.convert_to_numpy(state)
            self.steps += 1

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
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative", interval=2, seed=0)
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
    states = np.array([(first[0], first[1] + i) for i in range(steps)])
    if watch.steps:
        np.testing.assert_array_equal(watch.states, states)
    draw = compile_function(lambda key: RandomStream(key).fold_in(0).normal((16,)))
    noise = [
        keras.ops.convert_to_numpy(draw(keras.ops.convert_to_tensor(s.astype("int64"))))
        for s in states
    ]
    assert len(np.unique(noise, axis=0)) == steps
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
