"""Directions in weight space."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs.flatness.loss import base_model
from keras_nrs.unit_axes import Axes
from keras_nrs.unit_axes import unit_axes

Array = NDArray[Any]
Direction = Sequence[Any]

# A random stream of the seed that no initializer draws from.
_STREAM = 0x6E7273


def random_direction(model: keras.Model, *, seed: int, index: int = 0) -> list[Array]:
    """A random normal direction, scaled to the norms of the model's filters.

    Each filter of the direction has the norm of the model's filter, so that a step of 1
    means the same for layers of any scale. `keras_nrs.unit_axes.unit_axes` says what a
    filter is in each layer. Biases and scales, which have none, get zeros.

    Args:
        model: A built model, wrapped or not.
        seed: Seed of the random numbers, which are the same for all models of one
            architecture.
        index: 0 or more, for independent directions of one seed.

    Returns:
        An array for each trainable variable of the model.

    Reference: [Li et al., 2018](https://arxiv.org/abs/1712.09913), Section 4.
    """
    index = check_int("index", index, minimum=0)
    # `default_rng(seed)` itself may have initialized the weights.
    rng = np.random.default_rng((check_seed("seed", seed), _STREAM, index))
    model = base_model(model, needs_loss=False)
    return [
        filter_normalized(rng.standard_normal(v.shape), ops.convert_to_numpy(v), axes)
        if axes
        else np.zeros(v.shape)
        for v, axes in zip(model.trainable_variables, unit_axes(model), strict=True)
    ]


def filter_normalized(direction: Array, weights: Array, unit_axes: Axes) -> Array:
    """The direction, each filter scaled to the norm of the weights' filter."""
    axes = tuple(set(range(weights.ndim)) - set(unit_axes))

    def norm(array: Array) -> Array:
        squares = np.square(array, dtype="float64")
        return np.sqrt(np.sum(squares, axis=axes, keepdims=True))

    norms = norm(direction)
    return direction * norm(weights) / np.where(norms == 0, 1.0, norms)


def check_directions(model: Any, directions: Any, seed: int) -> list[list[Array]]:
    seed = check_seed("seed", seed)
    if isinstance(directions, Integral):
        number = check_int("directions", directions, minimum=1, maximum=2)
        return [random_direction(model, seed=seed, index=i) for i in range(number)]
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    try:
        chosen = [[ops.convert_to_numpy(part) for part in d] for d in directions]
    except TypeError:
        raise TypeError(
            "`directions` must be 1, 2, or a list of one or two directions, each a "
            f"list of arrays. Received: directions={directions!r}."
        ) from None
    if not 1 <= len(chosen) <= 2 or any([p.shape for p in d] != shapes for d in chosen):
        raise ValueError(
            "`directions` must be 1, 2, or a list of one or two directions, each with "
            f"an array for each of the model's {len(shapes)} trainable variables. "
            f"Received: a list of {len(chosen)}, whose arrays begin with the shapes "
            f"{[[p.shape for p in d][:3] for d in chosen]}. The variables begin with "
            f"the shapes {shapes[:3]}."
        )
    return chosen
