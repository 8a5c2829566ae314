"""Figures of landscapes and spectral densities."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from keras_nrs._checks import check_positive
from keras_nrs._files import atomic_write

if TYPE_CHECKING:
    from keras_nrs.flatness.density import SpectralDensity
    from keras_nrs.flatness.landscape import Landscape

# Okabe and Ito's palette, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK = "#56B4E9", "#D55E00", "#000000"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
LINES = ("-", "--", "-.", ":")
_NUM_LEVELS = 16


def _figure(columns: int, width: float = 4.6, height: float = 4.0) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Figures need the package {error.name}. Install it with: "
            'pip install "keras-nrs[flatness]"',
            name=error.name,
        ) from error
    return Figure(figsize=(width * columns, height), dpi=150, layout="constrained")


def _style(axes: Any, *, columns: int = 1) -> None:
    """Letters that can be read where the figure is as wide as a phone."""
    size = 13 + 3 * min(columns - 1, 2)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_fontsize(size)
    axes.tick_params(labelsize=size - 2)
    axes.locator_params(axis="x", nbins=5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=size)


def _written(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure, after it was written as a whole or not at all."""
    if path is not None:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format=unfinished.suffix.lstrip(".") or "png")
    return figure


def _check_mapping(name: str, value: Any, attribute: str) -> None:
    """Raise an error if this is no dict of measurements, or an empty one."""
    is_mapping = isinstance(value, Mapping) and len(value) > 0
    if not is_mapping or not all(hasattr(v, attribute) for v in value.values()):
        raise TypeError(
            f"`{name}` must be a dict from the names that the figure shows to what is "
            f"drawn, at least one. Received: {name}={value!r}."
        )


def draw_landscapes(
    landscapes: Mapping[str, "Landscape"],
    path: str | os.PathLike[str] | None = None,
    *,
    kind: str = "contour",
    log: bool = True,
) -> Any:
    """Draw the landscapes of several models on one scale.

    Those along one direction are curves in one panel; those along two are panels with
    common levels (`kind="contour"`) or surfaces with common axes (`"surface"`).

    Args:
        landscapes: By the names that the figure shows.
        path: Of an image to write, PNG or what else matplotlib knows.
        kind: `"contour"` or `"surface"`; for two directions only.
        log: Whether levels of contours are spaced evenly in the logarithm of the
            loss.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError, ValueError: if an argument is not as described, or if they do not
            have the same number of directions.
    """
    _check_mapping("landscapes", landscapes, "coordinates")
    dimensions = {len(landscape.coordinates) for landscape in landscapes.values()}
    if len(dimensions) != 1 or kind not in ("contour", "surface"):
        raise ValueError(
            "`landscapes` must all have one direction, or all two, and `kind` must be "
            f"'contour' or 'surface'. Received: {sorted(dimensions)} directions and "
            f"kind={kind!r}."
        )
    if dimensions == {1}:
        figure = _draw_curves(landscapes)
    else:
        figure = _draw_panels(landscapes, kind, log)
    return _written(figure, path)


def _draw_curves(landscapes: Mapping[str, "Landscape"]) -> Any:
    figure = _figure(1, width=6)
    axes = figure.subplots()
    for i, (name, landscape) in enumerate(landscapes.items()):
        axes.plot(*landscape.coordinates, landscape.losses, **_line(i, name))
    axes.set_xlabel("distance (multiples of the direction)")
    axes.set_ylabel("loss")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _style(axes)
    return figure


def _line(i: int, name: str) -> dict[str, Any]:
    """How the i-th curve looks, in colour and in print."""
    color, line = COLORS[i % len(COLORS)], LINES[i % len(LINES)]
    return {"color": color, "linestyle": line, "linewidth": 2, "label": name or None}


def _draw_panels(landscapes: Mapping[str, "Landscape"], kind: str, log: bool) -> Any:
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
    figure = _figure(len(landscapes))
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
        # Rows are of the first coordinate, which matplotlib draws along columns.
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
        _style(axes, columns=len(landscapes))
        axes.locator_params(axis="y", nbins=5)
    return figure


def draw_densities(
    densities: Mapping[str, "SpectralDensity"],
    path: str | os.PathLike[str] | None = None,
    *,
    bandwidth: float | None = None,
) -> Any:
    """Draw spectral densities of several models into one panel.

    Args:
        densities: By the names that the figure shows.
        path: Of an image to write, PNG or what else matplotlib knows.
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
    figure = _figure(1, width=6)
    axes = figure.subplots()
    highest = 0.0
    for i, (name, density) in enumerate(densities.items()):
        values = density.density(points, bandwidth=bandwidth)
        axes.semilogy(points, values, **_line(i, name))
        highest = max(highest, values.max())
    # Of n eigenvalues the density of a single one is the least that can be seen.
    size = max(density.size for density in densities.values())
    axes.set_ylim(0.1 / (size * bandwidth * np.sqrt(2 * np.pi)), 2 * highest)
    axes.set_xlabel("eigenvalue (loss per squared weight)")
    axes.set_ylabel("density (share per unit)")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _style(axes)
    return _written(figure, path)
