"""Figures of landscapes and spectral densities."""

import os
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keras_nrs._checks import check_positive
from keras_nrs._files import atomic_write

Array = NDArray[Any]

# Okabe and Ito's palette, whose colours the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK = "#56B4E9", "#D55E00", "#000000"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
LINES = ("-", "--", "-.", ":")
_NUM_LEVELS = 16


class Losses(Protocol):
    """A `Landscape`, as far as figures need one."""

    @property
    def coordinates(self) -> tuple[Array, ...]: ...

    @property
    def losses(self) -> Array: ...


class Spectrum(Protocol):
    """A `SpectralDensity`, as far as figures need one."""

    @property
    def nodes(self) -> Array: ...

    @property
    def weights(self) -> Array: ...

    @property
    def size(self) -> int: ...

    def density(self, points: Array, *, bandwidth: float) -> Array: ...


def _new_figure(columns: int, width: float = 4.6, height: float = 4.0) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Figures need the package {error.name}. Install it with: "
            'pip install "keras-nrs[flatness]"',
            name=error.name,
        ) from error
    return Figure(figsize=(width * columns, height), dpi=150, layout="constrained")


def _style_axes(axes: Any, *, columns: int = 1) -> None:
    """Set letters that remain readable when the figure is as wide as a phone."""
    size = 13 + 3 * min(columns - 1, 2)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_fontsize(size)
    axes.tick_params(labelsize=size - 2)
    axes.locator_params(axis="x", nbins=5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=size)


def _save_figure(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """Write a figure whole or not at all, if there is a path, and return it."""
    if path is not None:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format=unfinished.suffix.lstrip(".") or "png")
    return figure


def _check_mapping(name: str, value: Any, attribute: str) -> None:
    """Raise an error unless `value` is a dict with at least one measurement."""
    is_mapping = isinstance(value, Mapping) and len(value) > 0
    if not is_mapping or not all(hasattr(v, attribute) for v in value.values()):
        raise TypeError(
            f"`{name}` must be a dict from a name, which the figure shows, to the "
            f"measurement, with at least one item. Received: {name}={value!r}."
        )


def draw_landscapes(
    landscapes: Mapping[str, Losses],
    path: str | os.PathLike[str] | None = None,
    *,
    kind: str = "contour",
    log: bool = True,
) -> Any:
    """Draw the landscapes of several models on one scale.

    Landscapes with one direction are curves in one panel. Landscapes with two are
    panels with common levels (`kind="contour"`) or common axes (`"surface"`).

    Args:
        landscapes: A dict from the names that the figure shows to `Landscape`s.
        path: Path of an image to write, in PNG or another format of matplotlib.
        kind: `"contour"` or `"surface"`; for two directions only.
        log: Whether levels of contours are spaced evenly in the logarithm of the
            loss.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the landscapes
            differ in their number of directions.
    """
    _check_mapping("landscapes", landscapes, "coordinates")
    dimensions = {len(landscape.coordinates) for landscape in landscapes.values()}
    if len(dimensions) != 1 or kind not in ("contour", "surface"):
        raise ValueError(
            "`landscapes` must all have one direction or all have two, and `kind` must "
            f"be 'contour' or 'surface'. Received: {sorted(dimensions)} directions and "
            f"kind={kind!r}."
        )
    if dimensions == {1}:
        figure = _draw_curves(landscapes)
    else:
        figure = _draw_panels(landscapes, kind, log)
    return _save_figure(figure, path)


def _draw_curves(landscapes: Mapping[str, Losses]) -> Any:
    figure = _new_figure(1, width=6)
    axes = figure.subplots()
    for i, (name, landscape) in enumerate(landscapes.items()):
        axes.plot(*landscape.coordinates, landscape.losses, **_line_style(i, name))
    axes.set_xlabel("distance (multiples of the direction)")
    axes.set_ylabel("loss")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _style_axes(axes)
    return figure


def _line_style(i: int, name: str) -> dict[str, Any]:
    """The style of the i-th curve, which differs in colour and in black and white."""
    color, line = COLORS[i % len(COLORS)], LINES[i % len(LINES)]
    return {"color": color, "linestyle": line, "linewidth": 2, "label": name or None}


def _draw_panels(landscapes: Mapping[str, Losses], kind: str, log: bool) -> Any:
    losses = np.concatenate([a.losses.ravel() for a in landscapes.values()])
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        raise ValueError("`landscapes` must have finite losses. Received: none.")
    low, high = float(losses.min()), float(losses.max())
    high = high if high > low else low + 1.0
    levels, norm = np.linspace(low, high, _NUM_LEVELS), "linear"
    if log and low > 0:
        norm = "log"
        levels = np.geomspace(low, high, _NUM_LEVELS)
    figure = _new_figure(len(landscapes))
    subplot_kw = {"projection": "3d"} if kind == "surface" else {}
    panels = figure.subplots(
        1,
        len(landscapes),
        squeeze=False,
        sharex=True,
        sharey=True,
        subplot_kw=subplot_kw,
    )[0]
    for axes, (name, landscape) in zip(panels, landscapes.items(), strict=True):
        x, y = landscape.coordinates
        # Axis 0 of the losses is the first coordinate, and matplotlib takes it for y.
        if kind == "surface":
            grid = np.meshgrid(x, y, indexing="ij")
            axes.plot_surface(
                *grid, landscape.losses, cmap="viridis", vmin=low, vmax=high
            )
            axes.set_zlim(low, high)
        else:
            lines = axes.contour(
                x, y, landscape.losses.T, levels=levels, cmap="viridis", norm=norm
            )
            axes.clabel(lines, lines.levels[::3], fontsize=10, fmt="%.2g")
            axes.plot(0, 0, marker="+", color="black")
            axes.set_aspect("equal")
        axes.set_title(name)
        axes.set_xlabel("distance, first direction")
        axes.set_ylabel("distance, second direction")
        _style_axes(axes, columns=len(landscapes))
        axes.locator_params(axis="y", nbins=5)
    return figure


def draw_densities(
    densities: Mapping[str, Spectrum],
    path: str | os.PathLike[str] | None = None,
    *,
    bandwidth: float | None = None,
) -> Any:
    """Draw spectral densities of several models into one panel.

    Args:
        densities: A dict from the names that the figure shows to `SpectralDensity`s.
        path: Path of an image to write, in PNG or another format of matplotlib.
        bandwidth: As in `SpectralDensity.density()`. Defaults to 1 % of the range of
            all nodes.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    _check_mapping("densities", densities, "nodes")
    nodes = np.concatenate([d.nodes[d.weights > 0] for d in densities.values()])
    low, high = float(nodes.min()), float(nodes.max())
    width = (high - low) or abs(high) or 1.0
    if bandwidth is None:
        bandwidth = 0.01 * width
    bandwidth = check_positive("bandwidth", bandwidth)
    points = np.linspace(low - 0.05 * width, high + 0.05 * width, 500)
    figure = _new_figure(1, width=6)
    axes = figure.subplots()
    highest = 0.0
    for i, (name, density) in enumerate(densities.items()):
        values = density.density(points, bandwidth=bandwidth)
        axes.semilogy(points, values, **_line_style(i, name))
        highest = max(highest, values.max())
    # The axis starts below the density of one eigenvalue, the smallest one to see.
    size = max(density.size for density in densities.values())
    axes.set_ylim(0.1 / (size * bandwidth * np.sqrt(2 * np.pi)), 2 * highest)
    axes.set_xlabel("eigenvalue (loss per squared weight)")
    axes.set_ylabel("density (share per unit)")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _style_axes(axes)
    return _save_figure(figure, path)
