"""The plane in weight space that shows most of one or several trainings."""

import os
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs._checks import check_nonnegative
from keras_nrs.flatness.loss import base_model

Array = NDArray[Any]
# Of checkpoints: a file, a model, or an array for each trainable variable or for each
# variable.
Run = Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One or several paths through weight space, on a plane through a model.

    Attributes:
        directions: Two unit vectors, orthogonal, each a list with an array for each
            trainable variable, for `loss_landscape(directions=...)`.
        paths: For each run an array of shape `(num_checkpoints, 2)`: its places on the
            plane. The model is at (0, 0).
        distances: For each run an array of shape `(num_checkpoints,)`: how far each
            checkpoint is from the plane. The loss there is not that on the plane.
        explained_variance: Shape `(2,)`, the share of the checkpoints' variance along
            each direction.
    """

    directions: list[list[Array]]
    paths: dict[str, Array]
    distances: dict[str, Array]
    explained_variance: Array

    def span(self, margin: float = 0.2) -> list[tuple[float, float]]:
        """The range of all paths and the model, for `loss_landscape(span=...)`.

        Args:
            margin: Room on each side, >= 0, as a share of the larger of both ranges.

        Returns:
            A pair for each direction.
        """
        margin = check_nonnegative("margin", margin)
        points = np.concatenate([*self.paths.values(), np.zeros((1, 2))])
        low, high = points.min(axis=0), points.max(axis=0)
        room = margin * (float((high - low).max()) or 1.0)
        # A direction in which nothing moves still has a range.
        room = room or 1e-3 * (float((high - low).max()) or 1.0)
        pairs = zip(low - room, high + room, strict=True)
        return [(float(first), float(last)) for first, last in pairs]


def trajectory(model: keras.Model, checkpoints: Run | Mapping[str, Run]) -> Trajectory:
    """Project weights during training on the plane that shows most of their variance.

    The plane goes through the weights of `model`, along the first two principal
    components of all checkpoints together. Any random walk in many dimensions has
    large components: about 61 % and 15 % of its variance. So a smooth arc by itself
    says little.

    BatchNormalization's statistics are no part of the weights: see `batch_norm_data` of
    `loss_landscape`.

    Args:
        model: A built model, wrapped or not, which the plane goes through: mostly the
            trained one. It stays as it is.
        checkpoints: The weights of a run, in order, at least two: paths of files that
            `model.save_weights()`, `model.save()` or `ModelCheckpoint` wrote, models,
            or lists of arrays, as `model.get_weights()` returns them, and
            `keras_nrs.callbacks.WeightRecorder` keeps. For several runs a dict from
            the names that figures show to their checkpoints. The points of a `Curve`
            are a run, too.

    Returns:
        A `Trajectory`, for `draw_landscapes(trajectory=...)`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the checkpoints do
            not differ.

    References:
        [Li et al., 2018](https://arxiv.org/abs/1712.09913), Section 7;
        [Antognini and Sohl-Dickstein, 2018](https://arxiv.org/abs/1806.08805), for
        random walks.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.set_weights([np.zeros((2, 1)), np.zeros(1)])
    >>> run = [[np.array([[4.0], [0.0]]), np.ones(1)], [np.zeros((2, 1)), np.ones(1)]]
    >>> path = keras_nrs.flatness.trajectory(model, run)
    >>> path.explained_variance
    array([1., 0.])
    >>> np.abs(path.paths[""]).round(6)
    array([[4., 1.],
           [0., 1.]])
    """
    runs = checkpoints if isinstance(checkpoints, Mapping) else {"": checkpoints}
    _check_runs(runs)
    origin = _flat(_current_weights(model))
    reader = _Reader(model)
    moves = {
        name: np.stack([_flat(reader.weights(c)) for c in run]) - origin
        for name, run in runs.items()
    }
    together = np.concatenate(list(moves.values()))
    components, shares = _principal_components(together)
    paths = {name: of_run @ components.T for name, of_run in moves.items()}
    distances = {
        name: np.linalg.norm(of_run - paths[name] @ components, axis=1)
        for name, of_run in moves.items()
    }
    return Trajectory(
        directions=[_shaped(component, reader.shapes) for component in components],
        paths=paths,
        distances=distances,
        explained_variance=shares,
    )


def _check_runs(runs: Mapping[str, Any]) -> None:
    are_lists = all(
        isinstance(run, Sequence) and not isinstance(run, str) for run in runs.values()
    )
    if not are_lists or sum(map(len, runs.values())) < 2 or not all(runs.values()):
        raise ValueError(
            "`checkpoints` must be a list of at least two checkpoints, or a dict of "
            "such lists. Received: "
            + ("no list." if not are_lists else f"{[len(r) for r in runs.values()]}.")
            + " For example: checkpoints=['epoch_1.weights.h5', 'epoch_2.weights.h5']"
        )


def _principal_components(points: Array) -> tuple[Array, Array]:
    """Two orthogonal unit vectors as rows, and their shares of the variance.

    From the small matrix of inner products: there are far more weights than points.
    """
    centered = points - points.mean(axis=0)
    if not np.isfinite(centered).all() or not centered.any():
        raise ValueError(
            "`checkpoints` must be finite and differ from each other. Received: "
            f"{len(points)} checkpoints that "
            + ("are the same." if np.isfinite(centered).all() else "are not finite.")
        )
    variances, vectors = np.linalg.eigh(centered @ centered.T)
    shares = np.maximum(variances[::-1][:2], 0) / np.maximum(variances, 0).sum()
    first = _unit(centered.T @ vectors[:, -1])
    second = centered.T @ vectors[:, -2]
    second = second - (second @ first) * first
    # Points on one line leave the second direction open.
    if np.linalg.norm(second) < 1e-6 * np.linalg.norm(centered):
        shares = np.array([1.0, 0.0])
        second = _orthogonal(points[0], first)
    return np.stack([first, _unit(second)]), shares


def _orthogonal(vector: Array, to: Array) -> Array:
    """The part of a vector that is orthogonal to a unit vector, or a random one."""
    rest = vector - (vector @ to) * to
    if np.linalg.norm(rest) > 1e-6 * np.linalg.norm(vector):
        return rest
    random = np.random.default_rng(0).standard_normal(vector.shape)
    return random - (random @ to) * to


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def _flat(arrays: Sequence[Array]) -> Array:
    return np.concatenate([np.ravel(a).astype("float64") for a in arrays])


def _shaped(vector: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(vector, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _current_weights(model: Any) -> list[Array]:
    variables = base_model(model, needs_loss=False).trainable_variables
    return [ops.convert_to_numpy(v) for v in variables]


class _Reader:
    """Reads the trainable weights of checkpoints in any form.

    Args:
        model: The model, wrapped or not, whose weights they are.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        base = base_model(model, needs_loss=False)
        self.shapes = [tuple(v.shape) for v in base.trainable_variables]
        # `get_weights()` of the model itself, wrapped or not.
        self._all = {
            len(m.weights): [self._place(m, v) for v in base.trainable_variables]
            for m in (model, base)
        }

    @staticmethod
    def _place(model: Any, variable: Any) -> int:
        return next(i for i, v in enumerate(model.weights) if v is variable)

    def weights(self, checkpoint: Any) -> list[Array]:
        """The values of the model's trainable variables in a checkpoint."""
        if isinstance(checkpoint, str | os.PathLike):
            with _unchanged(self._model):
                self._model.load_weights(checkpoint)
                return _current_weights(self._model)
        if isinstance(checkpoint, keras.Model):
            return self._checked(_current_weights(checkpoint))
        try:
            arrays = [np.asarray(ops.convert_to_numpy(a)) for a in checkpoint]
        except (TypeError, ValueError):
            arrays = []
        places = self._all.get(len(arrays))
        if [a.shape for a in arrays] != self.shapes and places is not None:
            arrays = [arrays[i] for i in places]
        return self._checked(arrays)

    def _checked(self, arrays: list[Array]) -> list[Array]:
        shapes = [a.shape for a in arrays]
        if shapes != self.shapes:
            raise ValueError(
                "`checkpoints` must be files, models, or lists of arrays with the "
                "weights of `model`. Received: one with arrays that begin with the "
                f"shapes {shapes[:3]}, and not {self.shapes[:3]}."
            )
        return arrays


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """A context after which a model, and its optimizer, are as before."""
    variables = [*model.variables]
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    try:
        with warnings.catch_warnings():
            # The optimizer of the model may not be the one that was saved.
            warnings.filterwarnings("ignore", message="Skipping variable loading")
            yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
