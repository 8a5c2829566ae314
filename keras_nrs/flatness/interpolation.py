"""The loss on paths between two models."""

import os
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_int
from keras_nrs.batches import Batches
from keras_nrs.flatness.curve import Curve
from keras_nrs.flatness.curve import check_curve
from keras_nrs.flatness.curve import check_same_shapes
from keras_nrs.flatness.data_loss import DataLoss
from keras_nrs.flatness.data_loss import Values
from keras_nrs.flatness.data_loss import moments_batches
from keras_nrs.flatness.data_loss import to_tensors
from keras_nrs.flatness.landscape import Landscape
from keras_nrs.flatness.landscape import check_span
from keras_nrs.flatness.landscape import measure_losses
from keras_nrs.flatness.loss import base_model

Array = NDArray[Any]


def interpolate(  # noqa: PLR0913
    model: keras.Model,
    other: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_points: int = 21,
    span: tuple[float, float] = (-0.5, 1.5),
    curve: Curve | None = None,
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    batch_norm_data: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: int = 0,
) -> Landscape:
    """The loss on the line or curve through two models: 0 is the first, 1 the second.

    All float variables are interpolated, so that the loss at 1 is that of `other`. The
    moving statistics of BatchNormalization are not extrapolated beyond the models, and
    between them they are not those of the network there, unless you give
    `batch_norm_data`.

    Args:
        model: A built model, compiled with a loss, wrapped or not. Its loss is used.
        other: A model with variables of the same shapes, wrapped or not.
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`.
        y: Labels.
        num_points: Number of points, >= 2.
        span: First and last coordinate.
        curve: A curve from `connect(model, other, ...)`, whose ends the models still
            are. Defaults to the straight line.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        batch_norm_data: As in `loss_landscape`.
        checkpoint: As in `loss_landscape`.
        verbose: 1 to show progress.

    Returns:
        A `Landscape` with one direction, which has a method `barrier()`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6544);
        [Garipov et al., 2018](https://arxiv.org/abs/1802.10026), for curves.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> def make_model(weight):
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     model.compile(loss="mse")
    ...     model.set_weights([np.full((1, 1), weight), np.zeros(1)])
    ...     return model
    >>> x, y = np.ones((1, 1), "float32"), np.zeros((1, 1), "float32")
    >>> line = keras_nrs.flatness.interpolate(
    ...     make_model(-1.0), make_model(1.0), x, y, num_points=3, span=(0, 1)
    ... )
    >>> line.losses, line.barrier()
    (array([1., 0., 1.]), 0.0)
    """
    model = base_model(model)
    other = base_model(other, needs_loss=False)
    check_bool("regularizers", regularizers)
    num_points = check_int("num_points", num_points, minimum=2)
    coordinates = np.linspace(*check_span(span), num_points)
    check_same_shapes(model, other)
    weights, state = stateless.current_values(model)
    _, state_of_other = stateless.current_values(other)
    path = Curve.line(model, other)
    if curve is not None:
        path = check_curve(curve, path)

    def variables_at(point: tuple[float, ...]) -> Values:
        (coordinate,) = point
        # An extrapolated variance of BatchNormalization could be negative.
        share = min(max(coordinate, 0.0), 1.0)
        between = [
            _between(ops.convert_to_numpy(a), ops.convert_to_numpy(b), share)
            for a, b in zip(state, state_of_other, strict=True)
        ]
        moved = to_tensors(path.point(coordinate), weights)
        return moved, to_tensors(between, state)

    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    loss_of = DataLoss(
        model,
        batches,
        regularizers=regularizers,
        moments_of=moments_batches(model, batch_norm_data, batch_size),
    )
    return measure_losses(
        lambda point: loss_of(variables_at(point)),
        (coordinates,),
        checkpoint=checkpoint,
        verbose=verbose,
    )


def _between(first: Array, second: Array, share: float) -> Array:
    """A point on the line. Integers, such as seeds, stay those of the first model."""
    if not keras.backend.is_float_dtype(str(first.dtype)):
        return first
    return (1 - share) * first.astype("float64") + share * second
