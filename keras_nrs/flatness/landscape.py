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
from keras_nrs._files import DamagedFileError
from keras_nrs._files import atomic_write
from keras_nrs.batches import Batches
from keras_nrs.flatness import plots
from keras_nrs.flatness.data_loss import DataLoss
from keras_nrs.flatness.data_loss import Values
from keras_nrs.flatness.data_loss import moments_batches
from keras_nrs.flatness.data_loss import to_tensors
from keras_nrs.flatness.directions import Direction
from keras_nrs.flatness.directions import check_directions
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.progress import Progress

Array = NDArray[Any]
Span = tuple[float, float]

# Seconds between two writes of a checkpoint.
_WRITE_EVERY = 10.0


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

    def barrier(self) -> float:
        """By how much the loss rises above the line between the losses at 0 and 1.

        The largest difference on a path between two models, as `interpolate` measures
        it: 0 if the loss nowhere exceeds a linear transition from one to the other.

        Raises:
            ValueError: if there is more than one direction, or no point at 0 or 1.

        Reference: [Entezari et al., 2022](https://arxiv.org/abs/2110.06296). Frankle et
        al. (2020) measure from the mean of both losses instead.
        """
        (t, *others), losses = self.coordinates, self.losses
        first, last = (np.flatnonzero(np.isclose(t, end)) for end in (0, 1))
        if others or not len(first) or not len(last):
            raise ValueError(
                "A barrier needs a path with points at both models, 0 and 1. Received: "
                f"{1 + len(others)} directions, the first from {t[0]:g} to {t[-1]:g}. "
                "Measure one: interpolate(model, other, x, y, span=(0, 1))"
            )
        between = slice(first[0], last[0] + 1)
        t, losses = t[between], losses[between]
        return float(np.max(losses - (1 - t) * losses[0] - t * losses[-1]))

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        kind: str = "contour",
        label: str = "loss",
        ax: Any = None,
        show: bool = False,
    ) -> Any:
        """Draw a curve for one direction, contours or a surface for two.

        `draw_landscapes` compares several landscapes, and draws trajectories.

        Args:
            path: Path of an image to write, in PNG or another format of matplotlib.
            kind: `"contour"` or `"surface"`.
            label: What the losses are, with their unit: `"training loss (nats)"`.
            ax: Axes of matplotlib to draw in. Defaults to a new figure.
            show: Whether to show the figure, as `matplotlib.pyplot.show()` does.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        return plots.draw_landscapes(
            {"": self}, path, kind=kind, label=label, ax=ax, show=show
        )


def loss_landscape(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    directions: int | Sequence[Direction] = 2,
    num_points: int = 21,
    span: Span | Sequence[Span] = (-1.0, 1.0),
    seed: int = 0,
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    batch_norm_data: Any = None,
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
        span: First and last coordinate, or one pair for each direction.
        seed: Seed of the random directions.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        batch_norm_data: Training inputs, or batches with them, on which the moving
            statistics of BatchNormalization are measured again at each point, as
            `keras_nrs.update_batch_norm` does. Defaults to none: the statistics stay
            those of the model, which moved weights do not have.
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
    chosen = check_directions(model, directions, seed)
    spans = _check_spans(span, len(chosen))
    weights, state = stateless.current_values(model)
    theta = [ops.convert_to_numpy(w).astype("float64") for w in weights]

    def variables_at(point: tuple[float, ...]) -> Values:
        moved = [
            w + np.tensordot(point, of_directions, axes=1)
            for w, *of_directions in zip(theta, *chosen, strict=True)
        ]
        return to_tensors(moved, weights), state

    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    loss_of = DataLoss(
        model,
        batches,
        regularizers=regularizers,
        moments_of=moments_batches(model, batch_norm_data, batch_size),
    )
    return measure_losses(
        lambda point: loss_of(variables_at(point)),
        tuple(np.linspace(*pair, num_points) for pair in spans),
        checkpoint=checkpoint,
        verbose=verbose,
    )


def measure_losses(
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
    # Another model, data set or direction differs most in a corner, but not where the
    # corner is a model: another end of a path, or another curve, differ elsewhere.
    found = np.argwhere(np.isfinite(known.losses)).tolist()
    chosen = {tuple(found[i]) for i in (0, len(found) // 2, -1)} if found else set()
    if not is_same or not all(
        np.isclose(known.losses[index], loss_at_index(index), rtol=1e-4)
        for index in sorted(chosen)
    ):
        raise ValueError(
            "`checkpoint` must be of the same model, data, directions and points. "
            f"Received: checkpoint={os.fspath(checkpoint)!r}, a file of another "
            "measurement. Delete it, or choose another name."
        )
    return known.losses


def check_span(span: Any) -> Span:
    """Two numbers in ascending order, or an error."""
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


def _check_spans(span: Any, number: int) -> list[Span]:
    """A span for each direction: the given one, or one of a pair for each."""
    is_list = isinstance(span, list | tuple) and len(span) == number
    if is_list and all(isinstance(pair, list | tuple) for pair in span):
        return [check_span(pair) for pair in span]
    return [check_span(span)] * number
