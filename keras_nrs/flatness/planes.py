"""Contours and surfaces of the losses on planes in weight space."""

from collections.abc import Mapping
from typing import Any
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keras_nrs.flatness.figures import Drawing
from keras_nrs.flatness.palette import styles

Array = NDArray[Any]

COLORMAP = "viridis"
_MOST_LEVELS = 12


class Losses(Protocol):
    """A `Landscape`, as far as figures need one."""

    @property
    def coordinates(self) -> tuple[Array, ...]: ...

    @property
    def losses(self) -> Array: ...


class Paths(Protocol):
    """A `Trajectory`, as far as figures need one."""

    @property
    def paths(self) -> dict[str, Array]: ...

    @property
    def explained_variance(self) -> Array: ...


def pooled(landscapes: Mapping[str, Losses]) -> Array:
    """The finite losses of all landscapes together."""
    losses = np.concatenate([a.losses.ravel() for a in landscapes.values()])
    finite: Array = losses[np.isfinite(losses)]
    return finite


def levels_of(losses: Array, *, log: bool) -> Array:
    """Round levels of contours that spread over most of the losses, ascending.

    Args:
        losses: Finite losses, of all landscapes together.
        log: Whether to space them evenly in the logarithm, if losses are positive.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = (float(q) for q in np.quantile(losses, [0.01, 0.98]))
    if not high > low:
        return low + (abs(low) or 1.0) * np.linspace(0, 1, 4)
    if log and low > 0 and high > 5 * low:
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = np.outer(decades, steps).ravel()
            found = found[(found >= low) & (found <= high)]
            if len(found) <= _MOST_LEVELS:
                break
        if len(found) >= 3:
            return found[:: -(-len(found) // _MOST_LEVELS)]
    ticks = np.asarray(MaxNLocator(nbins=_MOST_LEVELS - 2).tick_values(low, high))
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    return ticks if len(ticks) >= 3 else np.linspace(low, high, 6)


def draw_contours(
    drawing: Drawing,
    landscapes: Mapping[str, Losses],
    trajectory: Paths | None,
    *,
    log: bool,
    label: str,
) -> None:
    """Draw contours on common levels, with one colour bar, and paths on them."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    levels = levels_of(pooled(landscapes), log=log)
    colormap = colormaps[COLORMAP]
    norm = BoundaryNorm(levels, colormap.N, extend="both")
    for axes, (name, landscape) in zip(drawing.panels, landscapes.items(), strict=True):
        x, y = landscape.coordinates
        # Axis 0 of the losses is the first coordinate, and matplotlib takes it for y.
        losses = np.ma.masked_invalid(landscape.losses.T)
        # Where the loss overflows it is as above the highest level.
        axes.set_facecolor(colormap(1.0))
        filled = axes.contourf(
            x, y, losses, levels=levels, cmap=colormap, norm=norm, extend="both"
        )
        axes.contour(
            x, y, losses, levels=levels, colors="white", linewidths=0.5, alpha=0.6
        )
        _draw_marker(axes, (0, 0), "+", "black", 11)
        if trajectory is not None:
            _draw_paths(axes, trajectory)
        axes.set_title(name)
        x_share, y_share = _shares(trajectory)
        axes.set_xlabel(f"distance, first direction{x_share}")
        axes.set_ylabel(f"distance, second direction{y_share}")
        drawing.set_letters(axes, legend_frame=True)
        axes.locator_params(axis="y", nbins=5)
        if trajectory is None:
            axes.set_aspect("equal")
        axes.label_outer()
    bar = drawing.figure.colorbar(filled, ax=drawing.panels, ticks=levels)
    bar.ax.set_yticks(levels, [f"{level:.3g}" for level in levels])
    bar.ax.minorticks_off()
    bar.set_label(label)
    if drawing.is_new:
        bar.ax.yaxis.label.set_fontsize(drawing.letters)
        bar.ax.tick_params(labelsize=drawing.letters - 3)


def _shares(trajectory: Paths | None) -> tuple[str, str]:
    """The shares of the variance, as parts of the axes' labels."""
    if trajectory is None:
        return "", ""
    first, second = trajectory.explained_variance
    return (
        f"\n({100 * first:.0f} % of the variance)",
        f"\n({100 * second:.0f} % of the variance)",
    )


def _draw_paths(axes: Any, trajectory: Paths) -> None:
    """Draw paths with a light rim: from a circle to a star."""
    from matplotlib.patheffects import withStroke

    style_of = styles(trajectory.paths)
    for name, path in trajectory.paths.items():
        style = style_of[name]
        axes.plot(
            *path.T,
            **style.line,
            linewidth=2,
            marker=".",
            markersize=5,
            label=name or None,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )
    # Ends lie over all lines, and those of the first run over the others.
    for marker, end, size in (("o", 0, 7), ("*", -1, 14)):
        for name, path in reversed(trajectory.paths.items()):
            _draw_marker(axes, path[end], marker, style_of[name].color, size)


def _draw_marker(axes: Any, place: Any, marker: str, color: str, size: int) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot(
        *place,
        marker=marker,
        color=color,
        markersize=size,
        linestyle="none",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def height_scale(losses: Array, *, log: bool) -> tuple[float, float, bool]:
    """The lowest and highest height of surfaces, and whether it is the logarithm.

    A few far higher losses are cut off.
    """
    low, high = float(losses.min()), float(np.quantile(losses, 0.98))
    high = high if high > low else low + (abs(low) or 1.0)
    if log and low > 0:
        return float(np.log10(low)), float(np.log10(high)), True
    return low, high, False


def draw_surfaces(
    drawing: Drawing, landscapes: Mapping[str, Losses], *, log: bool, label: str
) -> None:
    """Draw surfaces on common axes."""
    from matplotlib.ticker import FuncFormatter

    low, high, is_log = height_scale(pooled(landscapes), log=log)
    for axes, (name, landscape) in zip(drawing.panels, landscapes.items(), strict=True):
        grid = np.meshgrid(*landscape.coordinates, indexing="ij")
        heights = landscape.losses
        heights = np.log10(heights) if is_log else heights
        heights = np.clip(np.nan_to_num(heights, nan=high, posinf=high), low, high)
        axes.plot_surface(
            *grid, heights, cmap=COLORMAP, vmin=low, vmax=high, linewidth=0
        )
        axes.set_zlim(low, high)
        if is_log:
            axes.zaxis.set_major_formatter(FuncFormatter(lambda z, _: f"{10**z:.2g}"))
        for axis in "xyz":
            axes.locator_params(axis=axis, nbins=4)
        # In three dimensions matplotlib sets labels over the letters of ticks.
        axes.set_title(name, fontsize=12)
        axes.set_xlabel("first direction", fontsize=10, labelpad=4)
        axes.set_ylabel("second direction", fontsize=10, labelpad=4)
        axes.set_zlabel(label, fontsize=10, labelpad=6)
        axes.tick_params(labelsize=9, pad=0)
        # The third axis lies outside of the box that layouts know.
        axes.set_box_aspect(None, zoom=0.85)
