"""The loss along directions in weight space."""

import io
import os
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs._files import DamagedFileError
from keras_nrs._files import atomic_write
from keras_nrs.backend import compile_function
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batches
from keras_nrs.flatness import plots
from keras_nrs.flatness.loss import BatchLoss
from keras_nrs.flatness.loss import Inputs
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.progress import Progress
from keras_nrs.unit_axes import Axes
from keras_nrs.unit_axes import unit_axes

Array = NDArray[Any]
Direction = Sequence[Any]
Values = tuple[list[Any], list[Any]]

# Seconds between two writes of a checkpoint.
_WRITE_EVERY = 10.0
# A random stream of the seed that no initializer draws from.
_STREAM = 0x6E7273


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Losses on a line or a plane in weight space.

    Attributes:
        coordinates: One array for each direction, in multiples of it. 0 is the model.
        losses: Shape `(len(coordinates[0]),)`, or `(len(coordinates[0]),
            len(coordinates[1]))`. NaN means not computed yet, infinity an overflow.
    """

    coordinates: tuple[Array, ...]
    losses: Array

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an `.npz` file whole or not at all."""
        arrays: Any = {f"coordinates_{i}": c for i, c in enumerate(self.coordinates)}
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, losses=self.losses, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Landscape":
        """Read a file that `save()` wrote.

        Raises:
            DamagedFileError: if it is another file, or is not as it was written.
        """
        data = io.BytesIO(Path(path).read_bytes())
        try:
            # An archive has a checksum of each array, which reading compares.
            with np.load(data) as arrays:
                names = sorted(n for n in arrays.files if n.startswith("coordinates_"))
                losses = arrays["losses"]
                coordinates = tuple(arrays[name] for name in names)
            shape = tuple(len(array) for array in coordinates)
            if (
                losses.dtype != np.dtype("float64")
                or losses.shape != shape
                or not shape
            ):
                raise ValueError(f"losses of shape {losses.shape} for {shape} points")
        except Exception as error:
            raise DamagedFileError(
                path,
                f"it is not as Landscape.save() wrote it ({error})",
                "Delete it, and compute it again, or choose another name.",
            ) from error
        return cls(coordinates=coordinates, losses=losses)

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, kind: str = "contour"
    ) -> Any:
        """Draw a curve for one direction, contours or a surface for two.

        `draw_landscapes` compares several landscapes.

        Args:
            path: Path of an image to write, in PNG or another format of matplotlib.
            kind: `"contour"` or `"surface"`.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        return plots.draw_landscapes({"": self}, path, kind=kind)


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


def loss_landscape(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    directions: int | Sequence[Direction] = 2,
    num_points: int = 21,
    span: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: int = 0,
) -> Landscape:
    """The compiled loss at theta + a * d1, or theta + a * d1 + b * d2.

    In inference mode, over the whole data set at every point.

    Args:
        model: A built model, compiled with a loss, wrapped or not.
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`.
        y: Labels.
        directions: 1 or 2 for random directions (see `random_direction`), or a list of
            one or two directions, each with an array for each trainable variable.
            Listed directions are not scaled;
            `hessian_eigenvalues(return_eigenvectors=True)` returns some.
        num_points: Number of points along each direction, >= 2. An odd number includes
            the model itself if `span` is symmetric.
        span: First and last coordinate along each direction.
        seed: Seed of the random directions.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        checkpoint: Path of an `.npz` file that keeps the points while they are
            computed, so that the same call, started again, goes on where it stopped.
        verbose: 1 to show progress.

    Returns:
        A `Landscape`, which can `save()` and `plot()` itself.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Li et al., 2018](https://arxiv.org/abs/1712.09913).

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = np.eye(2, dtype="float32"), np.zeros((2, 1), "float32")
    >>> landscape = keras_nrs.flatness.loss_landscape(model, x, y, num_points=5)
    >>> landscape.losses.shape
    (5, 5)
    """
    model = base_model(model)
    check_bool("regularizers", regularizers)
    num_points = check_int("num_points", num_points, minimum=2)
    coordinates = np.linspace(*_check_span(span), num_points)
    chosen = _check_directions(model, directions, seed)
    weights, state = stateless.current_values(model)
    theta = [ops.convert_to_numpy(w).astype("float64") for w in weights]

    def variables_at(point: tuple[float, ...]) -> Values:
        moved = [
            w + np.tensordot(point, of_directions, axes=1)
            for w, *of_directions in zip(theta, *chosen, strict=True)
        ]
        return _to_tensors(moved, weights), state

    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    loss_of = _loss_function(model, batches, regularizers)
    return _measure_losses(
        lambda point: loss_of(variables_at(point)),
        (coordinates,) * len(chosen),
        checkpoint=checkpoint,
        verbose=verbose,
    )


def interpolate(  # noqa: PLR0913
    model: keras.Model,
    other: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_points: int = 21,
    span: tuple[float, float] = (-0.5, 1.5),
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: int = 0,
) -> Landscape:
    """The loss on the line through two models: 0 is the first, 1 the second.

    All float variables are interpolated, so that the loss at 1 is that of `other`. The
    moving statistics of BatchNormalization are not extrapolated beyond the models.

    Args:
        model: A built model, compiled with a loss, wrapped or not. Its loss is used.
        other: A model with variables of the same shapes, wrapped or not.
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`.
        y: Labels.
        num_points: Number of points, >= 2.
        span: First and last coordinate.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        checkpoint: As in `loss_landscape`.
        verbose: 1 to show progress.

    Returns:
        A `Landscape` with one direction.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6544).
    """
    model = base_model(model)
    other = base_model(other, needs_loss=False)
    check_bool("regularizers", regularizers)
    num_points = check_int("num_points", num_points, minimum=2)
    coordinates = np.linspace(*_check_span(span), num_points)
    ends = [stateless.current_values(m) for m in (model, other)]
    shapes = [[tuple(t.shape) for part in end for t in part] for end in ends]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`other` must have variables of the same shapes as `model`. Received: "
            f"{len(shapes[1])} variables for {len(shapes[0])} of `model`, or variables "
            "of other shapes. Make both models with the same function."
        )
    numbers = [[list(map(ops.convert_to_numpy, p)) for p in end] for end in ends]

    def variables_at(point: tuple[float, ...]) -> Values:
        (coordinate,) = point
        # An extrapolated variance of BatchNormalization could be negative.
        coordinates_of_parts = coordinate, min(max(coordinate, 0.0), 1.0)
        weights, state = (
            _to_tensors(
                [_lerp(a, b, c) for a, b in zip(first, second, strict=True)],
                like,
            )
            for first, second, like, c in zip(
                *numbers, ends[0], coordinates_of_parts, strict=True
            )
        )
        return weights, state

    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    loss_of = _loss_function(model, batches, regularizers)
    return _measure_losses(
        lambda point: loss_of(variables_at(point)),
        (coordinates,),
        checkpoint=checkpoint,
        verbose=verbose,
    )


def _lerp(first: Array, second: Array, coordinate: float) -> Array:
    """A point on the line. Integers, such as seeds, stay those of the first model."""
    if not keras.backend.is_float_dtype(str(first.dtype)):
        return first
    return (1 - coordinate) * first.astype("float64") + coordinate * second


def _to_tensors(arrays: Sequence[Array], like: Sequence[Any]) -> list[Any]:
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in like]
    pairs = zip(arrays, dtypes, strict=True)
    return [ops.convert_to_tensor(np.asarray(a), dtype) for a, dtype in pairs]


def _loss_function(
    model: Any, batches: Batches, regularizers: bool
) -> Callable[[Values], float]:
    """A function from values of the variables to the loss over the data set."""
    loss = BatchLoss(
        model,
        model.trainable_variables,
        regularizers=regularizers,
        first_batch=next(iter(batches)),
    )
    compiled = compile_function(loss)

    def loss_of(values: Values) -> float:
        weights, state = values
        total, count = 0.0, 0
        # Each pass makes the same draws, should the model make any.
        with restored_random_state(weights[0]):
            for batch in batches:
                value = compiled(weights, Inputs(batch, weights, state))
                total += batch.num_samples * float(ops.convert_to_numpy(value))
                count += batch.num_samples
        return total / count

    return loss_of


def _measure_losses(
    loss_at: Callable[[tuple[float, ...]], float],
    coordinates: tuple[Array, ...],
    *,
    checkpoint: str | os.PathLike[str] | None,
    verbose: int,
) -> Landscape:
    """The losses at all points. Points in the checkpoint are not computed again."""
    losses = np.full([len(c) for c in coordinates], np.nan)
    landscape = Landscape(coordinates=coordinates, losses=losses)
    missing = list(np.ndindex(losses.shape))

    def loss_at_index(index: tuple[int, ...]) -> float:
        point = tuple(float(c[i]) for c, i in zip(coordinates, index, strict=True))
        value = loss_at(point)
        return np.inf if np.isnan(value) else value

    if checkpoint is not None and Path(checkpoint).exists():
        losses[...] = _read_checkpoint(landscape, checkpoint, loss_at_index)
        missing = [index for index in missing if np.isnan(losses[index])]
    progress = Progress(verbose, len(missing), "point")
    written = time.monotonic()
    try:
        for index in missing:
            losses[index] = loss_at_index(index)
            progress.advance()
            if checkpoint is not None and time.monotonic() - written > _WRITE_EVERY:
                landscape.save(checkpoint)
                written = time.monotonic()
    finally:
        if checkpoint is not None:
            landscape.save(checkpoint)
    progress.finish()
    return landscape


def _read_checkpoint(
    landscape: Landscape,
    checkpoint: str | os.PathLike[str],
    loss_at_index: Callable[[tuple[int, ...]], float],
) -> Array:
    """The losses in a checkpoint, or an error if another measurement wrote it."""
    known = Landscape.load(checkpoint)
    is_same = len(known.coordinates) == len(landscape.coordinates) and all(
        np.array_equal(a, b)
        for a, b in zip(known.coordinates, landscape.coordinates, strict=False)
    )
    # Another model, data set or direction differs most in a corner, the first index.
    found = np.argwhere(np.isfinite(known.losses))
    if is_same and len(found):
        index = tuple(int(i) for i in found[0])
        loss = loss_at_index(index)
        is_same = bool(np.isclose(known.losses[index], loss, rtol=1e-4))
    if not is_same:
        raise ValueError(
            "`checkpoint` must be of the same model, data, directions and points. "
            f"Received: checkpoint={os.fspath(checkpoint)!r}, a file of another "
            "measurement. Delete it, or choose another name."
        )
    return known.losses


def _check_span(span: Any) -> tuple[float, float]:
    try:
        first, last = map(float, span)
    except (TypeError, ValueError):
        first, last = np.nan, np.nan
    if not np.isfinite([first, last]).all() or first >= last:
        raise ValueError(
            "`span` must be two numbers, finite and in ascending order. Received: "
            f"span={span!r}. For example: span=(-1, 1)"
        )
    return first, last


def _check_directions(model: Any, directions: Any, seed: int) -> list[list[Array]]:
    seed = check_seed("seed", seed)
    if isinstance(directions, int):
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
