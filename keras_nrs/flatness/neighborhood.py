"""The neighborhood of a model's weights in which a largest loss is looked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_nrs import perturbations
from keras_nrs.perturbations import Perturbation
from keras_nrs.unit_axes import Axes

Array = NDArray[Any]
# An array for each perturbed variable.
Delta = list[Array]


class Neighborhood:
    """One ball around all weights together, or one around each group of weights.

    Args:
        radii: For each variable the radius of each of its groups, in a shape that
            broadcasts to the variable's. For one ball its radius, a number.
        axes: For each variable the axes that span a group.
    """

    def __init__(self, radii: list[Array] | float, axes: list[Axes]) -> None:
        self._radii = radii
        self._axes = axes

    def farthest(self, gradient: Sequence[Array]) -> Delta:
        """The delta in the neighborhood that goes farthest along a gradient.

        Each group moves by its radius, along its part of the gradient. A group whose
        part is zero does not move.
        """
        if isinstance(self._radii, float):
            factor = _ratio(self._radii, norm(gradient))
            return [factor * part for part in gradient]
        return [
            _ratio(radius, _norms(part, axes)) * part
            for part, radius, axes in zip(
                gradient, self._radii, self._axes, strict=True
            )
        ]


def neighborhood_of(
    perturbation: Perturbation,
    weights: Sequence[Array],
    units: Sequence[Axes],
    eps: float,
    widest: float,
) -> Neighborhood:
    """The neighborhood that holds all deltas of a perturbation.

    That of `Ball`, `RelativeBall`, `LayerwiseBall` and `FilterwiseBall` follows from
    their definitions. For any other it is the ball around all weights together that
    holds all draws.

    Args:
        perturbation: The perturbation.
        weights: Values of the perturbed variables.
        units: Their axes along which output units lie.
        eps: The size of the perturbations.
        widest: The largest norm of a draw.
    """
    whole: list[Axes] = [tuple(range(w.ndim)) for w in weights]
    if isinstance(perturbation, perturbations.FilterwiseBall):
        inside = [
            tuple(i for i in of_whole if i not in axes)
            for of_whole, axes in zip(whole, units, strict=True)
        ]
        return _of_groups(weights, eps, inside)
    if isinstance(perturbation, perturbations.LayerwiseBall):
        return _of_groups(weights, eps, whole)
    if isinstance(perturbation, perturbations.RelativeBall):
        return Neighborhood(eps * norm(weights), whole)
    if isinstance(perturbation, perturbations.Ball):
        return Neighborhood(eps, whole)
    return Neighborhood(widest, whole)


def _of_groups(weights: Sequence[Array], eps: float, axes: list[Axes]) -> Neighborhood:
    pairs = zip(weights, axes, strict=True)
    return Neighborhood([eps * _norms(w, of_group) for w, of_group in pairs], axes)


def norm(arrays: Sequence[Array]) -> float:
    """The norm of all arrays together."""
    return float(np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in arrays)))


def _norms(array: Array, axes: Axes) -> Array:
    squares = np.square(array, dtype="float64")
    # Without axes each element is a group: NumPy would take None for all axes.
    return np.sqrt(np.sum(squares, axis=axes, keepdims=True) if axes else squares)


def _ratio(numerator: Any, denominator: Any) -> Any:
    """The ratio, and 0 where the denominator is 0."""
    is_zero = denominator == 0
    return np.where(is_zero, 0.0, numerator / np.where(is_zero, 1.0, denominator))
