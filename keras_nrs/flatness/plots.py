"""Figures of landscapes and spectral densities."""

import os
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_positive
from keras_nrs.flatness.figures import Drawing
from keras_nrs.flatness.palette import styles
from keras_nrs.flatness.planes import Losses
from keras_nrs.flatness.planes import Paths
from keras_nrs.flatness.planes import draw_contours
from keras_nrs.flatness.planes import draw_surfaces

Array = NDArray[Any]

_GRID = {"color": "0.5", "alpha": 0.25, "linewidth": 0.8}


class Spectrum(Protocol):
    """A `SpectralDensity`, as far as figures need one."""

    @property
    def nodes(self) -> Array: ...

    @property
    def weights(self) -> Array: ...

    @property
    def size(self) -> int: ...

    def density(self, points: Array, *, bandwidth: float) -> Array: ...


def _check_mapping(name: str, value: Any, attribute: str) -> None:
    """Raise an error unless `value` is a dict with at least one measurement."""
    is_mapping = isinstance(value, Mapping) and len(value) > 0
    if not is_mapping or not all(hasattr(v, attribute) for v in value.values()):
        raise TypeError(
            f"`{name}` must be a dict from a name, which the figure shows, to the "
            f"measurement, with at least one item. Received: {name}={value!r}."
        )


def draw_landscapes(  # noqa: PLR0913
    landscapes: Mapping[str, Losses],
    path: str | os.PathLike[str] | None = None,
    *,
    kind: str = "contour",
    log: bool = True,
    label: str = "loss",
    trajectory: Paths | None = None,
    ax: Any = None,
    show: bool = False,
) -> Any:
    """Draw the landscapes of several models on one scale.

    Landscapes with one direction are curves in one panel. Landscapes with two are
    panels with common levels and a colour bar (`kind="contour"`), or common axes
    (`"surface"`). The names of methods ("baseline", "NRS", "RPR", "SAM" and others,
    "NRS, relative" too) have the same colours in all figures of this package.

    Args:
        landscapes: A dict from the names that the figure shows to `Landscape`s.
        path: Path of an image to write, in PNG or another format of matplotlib.
        kind: `"contour"` or `"surface"`; for two directions only.
        log: Whether levels of contours, or the height of surfaces, are spaced evenly
            in the logarithm of the loss, if all losses are positive.
        label: What the losses are, with their unit: `"training loss (nats)"`.
        trajectory: A `Trajectory`, whose paths are drawn on each panel of contours.
            The landscapes must be along its directions.
        ax: Axes of matplotlib to draw in, one for each panel. Defaults to a new figure.
        show: Whether to show the figure, as `matplotlib.pyplot.show()` does.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the landscapes
            differ in their number of directions.
    """
    _check_mapping("landscapes", landscapes, "coordinates")
    check_bool("show", show)
    dimensions = {len(landscape.coordinates) for landscape in landscapes.values()}
    if len(dimensions) != 1 or kind not in ("contour", "surface"):
        raise ValueError(
            "`landscapes` must all have one direction or all have two, and `kind` must "
            f"be 'contour' or 'surface'. Received: {sorted(dimensions)} directions and "
            f"kind={kind!r}."
        )
    if trajectory is not None and (dimensions == {1} or kind == "surface"):
        raise ValueError(
            "`trajectory` must be None, except on contours of two directions. "
            f"Received: a trajectory, {sorted(dimensions)} directions and "
            f"kind={kind!r}."
        )
    if dimensions == {1}:
        drawing = Drawing(ax, size=(6, 4), show=show)
        _draw_curves(drawing, landscapes, label)
    else:
        _check_finite(landscapes)
        drawing = Drawing(
            ax,
            len(landscapes),
            size=(4.4, 4.0),
            beside=0.0 if kind == "surface" else 1.2,
            show=show,
            projection="3d" if kind == "surface" else None,
        )
        if kind == "surface":
            draw_surfaces(drawing, landscapes, log=log, label=label)
        else:
            draw_contours(drawing, landscapes, trajectory, log=log, label=label)
    return drawing.finish(path)


def _check_finite(landscapes: Mapping[str, Losses]) -> None:
    if not any(np.isfinite(a.losses).any() for a in landscapes.values()):
        raise ValueError("`landscapes` must have finite losses. Received: none.")


def _draw_curves(
    drawing: Drawing, landscapes: Mapping[str, Losses], label: str
) -> None:
    (axes,) = drawing.panels
    style_of = styles(landscapes)
    for name, landscape in landscapes.items():
        axes.plot(
            *landscape.coordinates,
            landscape.losses,
            **style_of[name].line,
            linewidth=2,
            label=name or None,
        )
    axes.set_xlabel("distance (multiples of the direction)")
    axes.set_ylabel(label)
    _open_frame(axes)
    drawing.set_letters(axes)


def _open_frame(axes: Any) -> None:
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_densities(
    densities: Mapping[str, Spectrum],
    path: str | os.PathLike[str] | None = None,
    *,
    bandwidth: float | None = None,
    ax: Any = None,
    show: bool = False,
) -> Any:
    """Draw spectral densities of several models into one panel.

    Args:
        densities: A dict from the names that the figure shows to `SpectralDensity`s.
            Names of methods have the colours that they have in `draw_landscapes`.
        path: Path of an image to write, in PNG or another format of matplotlib.
        bandwidth: As in `SpectralDensity.density()`. Defaults to 1 % of the range of
            all nodes.
        ax: Axes of matplotlib to draw in. Defaults to a new figure.
        show: Whether to show the figure, as `matplotlib.pyplot.show()` does.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    _check_mapping("densities", densities, "nodes")
    check_bool("show", show)
    nodes = np.concatenate([d.nodes[d.weights > 0] for d in densities.values()])
    low, high = float(nodes.min()), float(nodes.max())
    width = (high - low) or abs(high) or 1.0
    if bandwidth is None:
        bandwidth = 0.01 * width
    bandwidth = check_positive("bandwidth", bandwidth)
    points = np.linspace(low - 0.05 * width, high + 0.05 * width, 500)
    drawing = Drawing(ax, size=(6, 4), show=show)
    (axes,) = drawing.panels
    style_of = styles(densities)
    highest = 0.0
    for name, density in densities.items():
        values = density.density(points, bandwidth=bandwidth)
        style = style_of[name].line
        axes.semilogy(points, values, **style, linewidth=2, label=name or None)
        highest = max(highest, values.max())
    # The axis starts below the density of one eigenvalue, the smallest one to see.
    size = max(density.size for density in densities.values())
    axes.set_ylim(0.1 / (size * bandwidth * np.sqrt(2 * np.pi)), 2 * highest)
    axes.set_xlabel("eigenvalue (loss per squared weight)")
    axes.set_ylabel("density (share per unit)")
    _open_frame(axes)
    drawing.set_letters(axes)
    return drawing.finish(path)
