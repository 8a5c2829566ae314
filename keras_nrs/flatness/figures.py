"""What all figures share: their sizes, letters, panels, files and windows."""

import os
from typing import Any

import numpy as np

from keras_nrs._files import atomic_write


def _import_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Figures need the package {error.name}. Install it with: "
            'pip install "keras-nrs[flatness]"',
            name=error.name,
        ) from error


class Drawing:
    """The panels of a figure that is being drawn: new ones, or the user's.

    Args:
        ax: `None` for a new figure, or the user's axes: one, or an array or list with
            one for each panel.
        panels: Number of panels.
        size: Width and height of a panel in inches.
        beside: Width of what stands beside the panels, in inches.
        show: Whether the figure is shown at the end.
        projection: `"3d"`, or `None`.

    Attributes:
        panels: The axes.
        figure: Their figure.
        is_new: Whether it is a new figure, whose letters are set here.
    """

    def __init__(
        self,
        ax: Any,
        panels: int = 1,
        *,
        size: tuple[float, float],
        beside: float = 0.0,
        show: bool,
        projection: str | None = None,
    ) -> None:
        _import_matplotlib()
        self._show = show
        self.is_new = ax is None
        if ax is not None:
            self.panels = _checked_axes(ax, panels, projection)
            self.figure = self.panels[0].figure
            return
        figsize = size[0] * panels + beside, size[1]
        self.figure = _new_figure(show, figsize=figsize, dpi=150, layout="constrained")
        is_flat = projection is None
        grid = self.figure.subplots(
            *(1, panels),
            squeeze=False,
            sharex=is_flat,
            sharey=is_flat,
            subplot_kw={} if is_flat else {"projection": projection},
        )
        self.panels = list(grid[0])

    def set_letters(self, axes: Any, *, legend_frame: bool = False) -> None:
        """Set letters that remain readable when the figure is as wide as a phone."""
        size = self.letters
        if axes.get_legend_handles_labels()[1]:
            font = {"fontsize": size - 1} if self.is_new else {}
            axes.legend(frameon=legend_frame, framealpha=0.9, **font)
        if not self.is_new:
            return
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_fontsize(size)
        axes.tick_params(labelsize=size - 2)
        axes.locator_params(axis="x", nbins=5)

    @property
    def letters(self) -> int:
        """The size of letters in points."""
        return 13 + 3 * min(len(self.panels) - 1, 2)

    def finish(self, path: str | os.PathLike[str] | None) -> Any:
        """Write the figure whole or not at all, if there is a path, and show it."""
        if path is not None:
            with atomic_write(path) as unfinished:
                form = unfinished.suffix.lstrip(".") or "png"
                self.figure.savefig(unfinished, format=form)
        if self._show:
            import matplotlib.pyplot as plt

            plt.show()
        return self.figure


def _new_figure(show: bool, **options: Any) -> Any:
    if show:
        import matplotlib.pyplot as plt

        return plt.figure(**options)
    from matplotlib.figure import Figure

    # Nothing of pyplot, which would keep the figure, or open a window.
    return Figure(**options)


def _checked_axes(ax: Any, panels: int, projection: str | None) -> list[Any]:
    """The user's axes as a list, or an error if they do not fit."""
    found = list(np.ravel(np.array(ax, dtype=object)))
    are_axes = all(hasattr(axes, "plot") and hasattr(axes, "figure") for axes in found)
    if not are_axes or len(found) != panels:
        raise ValueError(
            f"`ax` must be axes of matplotlib, one for each of {panels} panels. "
            f"Received: ax={ax!r}. For example: _, ax = plt.subplots(1, {panels})"
        )
    if projection == "3d" and not all(hasattr(axes, "plot_surface") for axes in found):
        raise ValueError(
            "`ax` must be three-dimensional axes for kind='surface'. Received: "
            f"ax={ax!r}. For example: ax = plt.subplot(projection='3d')"
        )
    return found
