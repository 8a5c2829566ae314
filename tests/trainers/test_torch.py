"""The training step on PyTorch."""

import gc
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs

pytestmark = pytest.mark.only_torch


def live_bytes() -> int:
    """The memory of all tensors that exist, garbage included."""
    import torch

    storages = [
        tensor.untyped_storage()
        for tensor in gc.get_objects()
        # Others, such as those of a graph that is traced, have no memory.
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
    ]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("options", [{}, {"memory_efficient": True}])
def test_a_step_leaves_no_activations(options: dict[str, Any]) -> None:
    """Not even until Python collects its garbage: a GPU may be full by then."""
    stack = [keras.layers.Dense(64, activation="relu") for _ in range(12)]
    model = keras.Sequential([keras.Input((64,)), *stack])
    model.compile("sgd", "mse")
    model = keras_nrs.wrap(model, **options)
    x = np.ones((2000, 64), "float32")
    model.train_on_batch(x, x)
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        model.train_on_batch(x, x)
        left = live_bytes() - before
    finally:
        gc.enable()
    # Keras keeps its inputs for so long, in each pass. There are 12 activations.
    assert left <= 5 * x.nbytes
