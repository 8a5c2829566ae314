"""How losses depend on the samples of a batch, tried with made-up data.

A step's own data and weights are not known while it is compiled.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.backend import eager_scope
from keras_nrs.backend import not_in_graphs
from keras_nrs.backend import restored_random_state
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state

Tensor = Any

# How far a loss may be rounded, as a share of it, in dtypes of few digits. Compiled
# losses are tried in float32, but a model may compute its own as it likes.
_ROUNDING = {"float16": 0.02, "bfloat16": 0.15}


@not_in_graphs
def layer_losses_are_sums(model: Any, x: Any) -> list[bool]:
    """Whether each loss that layers add doubles when each sample comes twice.

    Others stay as they are: means over a batch, and products of means. Empty if the
    layers do not take made-up data.

    Args:
        model: A built model.
        x: Its inputs: tensors, of which shapes and dtypes count.
    """

    def are_sums() -> list[bool]:
        once, twice = (_added_losses(model, _made_up(x, [0, 1] * n)) for n in (1, 2))
        return [abs(b) > 1.5 * abs(a) for a, b in zip(once, twice, strict=True)]

    return _tried(model, layer_losses_are_sums, are_sums) or []


def _added_losses(model: Any, x: Any) -> list[float]:
    with _scope(model) as scope:
        stateless.call(model, x, training=True)
        losses = stateless.added_losses(model, scope)
    return list(map(stateless.as_float, losses))


@not_in_graphs
def loss_compares_samples(model: Any, batch: Any, y_pred: Any) -> bool:
    """Whether the loss is no sum over samples, as where it compares their outputs.

    In a sum the outputs of one sample make the same difference, whatever those of
    another are. False if the loss does not take made-up data.

    Args:
        model: A compiled model.
        batch: A batch, as Keras gives it to `train_step()`: shapes and dtypes count.
        y_pred: Its outputs: shapes and dtypes count.
    """

    def compares() -> bool:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        x, y = _made_up((x, y), [0, 1])
        y = _in_float32(y)
        loss: dict[tuple[int, int], float] = {}
        for rows in [(0, 1), (2, 1), (0, 3), (2, 3)]:
            outputs = _in_float32(_made_up(y_pred, list(rows)))
            with (
                _scope(model),
                stateless.layer_losses(model, []),
                keras_internals.losses_in_float32(model),
            ):
                value = keras_internals.compute_loss(
                    model, x, y, outputs, None, training=True
                )
            loss[rows] = stateless.as_float(ops.mean(value))
            dtype = keras.backend.standardize_dtype(value.dtype)
        first, second = loss[2, 1] - loss[0, 1], loss[2, 3] - loss[0, 3]
        rounding = _ROUNDING.get(dtype, 1e-5) * abs(loss[0, 1])
        # False for losses that are not finite: they do not take made-up data.
        return abs(first - second) > rounding + 1e-2 * abs(second)

    return bool(_tried(model, loss_compares_samples, compares))


def _tried(model: Any, key: Any, attempt: Callable[[], Any]) -> Any:
    """The result of an attempt, made once for each model; `None` if it failed."""

    def make() -> Any:
        try:
            with (
                eager_scope(),
                restored_random_state(ops.zeros((2,), "int32")),
                drawing_from(host_random_state()),
            ):
                return attempt()
        except Exception:  # Of the user's code, which need not take made-up data.
            return None

    return stateless.cached_on_model(model, key, make)


def _made_up(structure: Any, samples: list[int]) -> Any:
    """Tensors like these, with given samples of made-up data.

    Floats are between 0 and 1, so that they may be probabilities; labels are 0 and 1.
    """

    def made_up(tensor: Tensor) -> Tensor:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        shape = [size or 4 for size in tensor.shape[1:]]
        values = np.random.default_rng(0).uniform(0.1, 0.9, (4, *shape))
        if not keras.backend.is_float_dtype(dtype):
            values = np.round(values)
        return ops.convert_to_tensor(values[samples], dtype=dtype)

    return tree.map_structure(lambda t: None if t is None else made_up(t), structure)


def _in_float32(structure: Any) -> Any:
    """The tensors, those of 16 bits as float32."""

    def in_float32(tensor: Tensor) -> Tensor:
        is_short = keras.backend.standardize_dtype(tensor.dtype) in _ROUNDING
        return ops.cast(tensor, "float32") if is_short else tensor

    return tree.map_structure(lambda t: None if t is None else in_float32(t), structure)


def _scope(model: Any) -> stateless.PassScope:
    """A scope with made-up weights and state."""
    rng = np.random.default_rng(0)
    weights = [
        ops.convert_to_tensor(rng.normal(size=tuple(v.shape)), dtype=v.dtype)
        for v in model.trainable_variables
    ]
    # Positive, as variances are.
    state = [ops.ones(v.shape, v.dtype) for v in model.non_trainable_variables]
    metrics = [ops.zeros(v.shape, v.dtype) for v in model.metrics_variables]
    return stateless.scope(model, weights, state, metrics)
