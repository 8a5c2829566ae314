"""BatchNorm's statistics, measured again."""

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs import stateless
from keras_nrs.backend import compile_function
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batches
from keras_nrs.keras_internals import sublayers
from keras_nrs.nrs_model import NRSModel
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state

Tensor = Any


def update_batch_norm(
    model: keras.Model, x: Any, *, batch_size: int = 32, steps: int | None = None
) -> None:
    """Set the moving statistics of BatchNorm to the moments of a data set.

    Use it after weights have changed without training: averaged, quantized or merged
    weights give activations with other moments than those that were recorded.
    The data go through the model once, in training mode. Each layer's mean and variance
    become those of all samples and positions together that its mask, if there is one,
    leaves in, and of all of its calls, if it is called more than once. Weights and the
    states of random generators do not change. Frozen layers, those that are called
    with `training=False` or not at all, and models without BatchNorm, stay as they are.

    Args:
        model: A built model, wrapped or not.
        x: Training inputs: an array of shape `(num_samples, ...)` or a list or dict of
            them, or batches from a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            `DataLoader` of PyTorch or a generator. Labels in the batches are not used.
        batch_size: Samples in a batch, if `x` is arrays: best as in training, since
            each batch is normalized by its own moments on the way.
        steps: Number of batches to use. Defaults to all.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Izmailov et al., 2018](https://arxiv.org/abs/1803.05407), Section 3.2.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> layer = keras.layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((1,)), layer])
    >>> keras_nrs.update_batch_norm(model, np.array([[1.0], [3.0], [5.0]], "float32"))
    >>> [np.round(keras.ops.convert_to_numpy(v), 3) for v in layer.weights[2:]]
    [array([3.], dtype=float32), array([2.667], dtype=float32)]
    """
    model = model.base_model if isinstance(model, NRSModel) else model
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "`model` must be a keras.Model that is built. Received: model="
            f"{model!r}. Call it on a batch of data first."
        )
    batches = Batches(model, x, batch_size=batch_size, steps=steps)
    moments = _moments(model)
    weights, state = stateless.current_values(model)
    measured = measured_state(model, batches, weights, state)
    for variable, value in zip(model.non_trainable_variables, measured, strict=True):
        if id(variable) in moments:
            variable.assign(value)


def measured_state(
    model: Any, batches: Batches, weights: Sequence[Tensor], state: Sequence[Tensor]
) -> list[Tensor]:
    """The state of a model with BatchNorm's moments of a data set at given weights.

    Args:
        model: A built model, which must not be wrapped.
        batches: The data.
        weights: Values of its trainable variables.
        state: Values of its non-trainable variables.
    """
    layers = _batch_norms(model)
    measured = list(state)
    if not layers:
        return measured
    at = {id(v): i for i, v in enumerate(model.non_trainable_variables)}
    places = [at[place] for place in _moments(model)]

    def make_pass() -> Any:
        def one_pass(weights: Sequence[Tensor], state: Sequence[Tensor], x: Any) -> Any:
            kwargs = stateless.call_kwargs(model, training=True)
            with _recorded(layers) as calls:
                state = model.stateless_call(weights, state, x, **kwargs)[1]
            return state, calls

        return compile_function(one_pass)

    # Flatness is measured in full precision, training may be in mixed precision.
    dtypes = tuple(sub.compute_dtype for sub in sublayers(model, recursive=True))
    one_pass = stateless.cached_on_model(
        model, (update_batch_norm, tuple(places), dtypes), make_pass
    )
    in_pass = list(state)
    for i in places:
        # Moments that are not finite would stay so, even times zero.
        is_finite = ops.isfinite(in_pass[i])
        in_pass[i] = ops.where(is_finite, in_pass[i], ops.zeros_like(in_pass[i]))
    # Sums for each channel.
    counts, means, squares = ([0.0] * len(layers) for _ in range(3))
    with (
        _without_momentum(layers),
        restored_random_state(in_pass[places[0]]),
        drawing_from(host_random_state()),
    ):
        for batch in batches:
            in_pass, calls = one_pass(weights, in_pass, batch.x)
            for i, of_layer in enumerate(calls):
                for call in of_layer:
                    mean, variance, count = (
                        ops.convert_to_numpy(m).astype("float64") for m in call
                    )
                    counts[i] += count
                    means[i] += count * mean
                    squares[i] += count * (variance + mean**2)
    for i in range(len(layers)):
        # A channel whose positions are all masked has no moments.
        if not np.all(counts[i]):
            continue
        mean = means[i] / counts[i]
        variance = np.maximum(squares[i] / counts[i] - mean**2, 0)
        for place, value in zip(
            places[2 * i : 2 * i + 2], (mean, variance), strict=True
        ):
            dtype = keras.backend.standardize_dtype(state[place].dtype)
            measured[place] = ops.convert_to_tensor(value, dtype)
    return measured


def _batch_norms(model: Any) -> list[Any]:
    """The layers of BatchNorm that are not frozen."""
    return [
        layer
        for layer in sublayers(model, recursive=True)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


def _moments(model: Any) -> list[int]:
    """The ids of their means and variances, one after the other."""
    pairs = [(sub.moving_mean, sub.moving_variance) for sub in _batch_norms(model)]
    return [id(variable) for pair in pairs for variable in pair]


@contextmanager
def _recorded(layers: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """A context that lists, for each layer, the moments of each call in training mode.

    A call has its mean, its variance, and the number of positions that these are of,
    for each channel. The state after a pass has the moments of the last call alone.
    """
    calls: list[list[Any]] = [[] for _ in layers]

    def recorded(layer: Any, of_layer: list[Any]) -> Any:
        call = layer.call

        def call_and_record(
            inputs: Any, training: Any = None, mask: Any = None, **kwargs: Any
        ) -> Any:
            outputs = call(inputs, training=training, mask=mask, **kwargs)
            if training:
                mean, variance = layer.moving_mean, layer.moving_variance
                count = _num_positions(layer, inputs, mask)
                of_layer.append((mean.value, variance.value, count))
            return outputs

        return call_and_record

    try:
        for layer, of_layer in zip(layers, calls, strict=True):
            # Past `__setattr__()`, which would track it.
            vars(layer)["call"] = recorded(layer, of_layer)
        yield calls
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _num_positions(layer: Any, inputs: Any, mask: Any) -> Tensor:
    """The number of elements of each channel that a mask leaves in."""
    counted = ops.ones_like(inputs, dtype="float32")
    if mask is not None:
        counted *= ops.cast(ops.expand_dims(mask, -1), "float32")
    channels = layer.axis % len(inputs.shape)
    axes = [axis for axis in range(len(inputs.shape)) if axis != channels]
    return ops.sum(counted, axis=axes)


@contextmanager
def _without_momentum(layers: Sequence[Any]) -> Iterator[None]:
    """A context in which moving statistics become those of the last batch."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
