"""Figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from keras_nrs.flatness import Landscape
from keras_nrs.flatness import SpectralDensity
from keras_nrs.flatness import Trajectory
from keras_nrs.flatness import draw_landscapes
from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import loss_landscape
from keras_nrs.flatness.palette import BLUE
from keras_nrs.flatness.palette import VERMILION
from keras_nrs.flatness.planes import levels_of
from tests.support.data import image_data
from tests.support.networks import cnn

pytestmark = pytest.mark.matrix

X = np.linspace(-1, 1, 5)
PLANE = Landscape(coordinates=(X, X), losses=0.01 + np.add.outer(X**2, 3 * X**2))
LINE = Landscape(coordinates=(X,), losses=X**2)
DENSITY = SpectralDensity(
    nodes=np.array([[0.0, 1.0]]),
    weights=np.array([[0.9, 0.1]]),
    size=9,
    num_products=2,
)


def test_drawn_into_the_users_axes() -> None:
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert PLANE.plot(ax=first) is figure
    assert LINE.plot(ax=second, label="training loss (nats)") is figure
    assert second.get_ylabel() == "training loss (nats)"
    assert DENSITY.plot(ax=second) is figure
    both = Figure().subplots(1, 2)
    drawn = draw_landscapes({"a": PLANE, "b": PLANE}, ax=both, label="loss (nats)")
    assert drawn.axes[-1].get_ylabel() == "loss (nats)"
    flat = Figure().subplots()
    for ax, kind, message in (
        (3, "contour", "`ax` must be axes of matplotlib, one for each of 1"),
        (both, "contour", "one for each of 1"),
        (flat, "surface", "three-dimensional"),
    ):
        with pytest.raises(ValueError, match=message):
            PLANE.plot(ax=ax, kind=kind)


def test_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    figures = [
        PLANE.plot(show=True),
        LINE.plot(show=True),
        draw_landscapes({"a": PLANE}, kind="surface", show=True),
        DENSITY.plot(show=True),
    ]
    plt.close("all")
    assert shown == figures
    LINE.plot()
    assert not plt.get_fignums()
    with pytest.raises(TypeError, match="`show` must be True or False"):
        LINE.plot(show=1)  # type: ignore[arg-type]


def test_a_trajectory_on_the_contours() -> None:
    paths = {"NRS": np.array([[-1, -1], [0, 0.5]]), "baseline": np.array([[1, 1.0]])}
    path = Trajectory(
        directions=[],
        paths=paths,
        distances={},
        explained_variance=np.array([0.75, 0.2]),
    )
    figure = draw_landscapes({"a": PLANE}, trajectory=path)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["NRS"].get_xydata(), paths["NRS"])
    assert lines["NRS"].get_color() == BLUE
    assert lines["baseline"].get_color() == VERMILION
    assert "75 % of the variance" in axes.get_xlabel()
    assert "20 % of the variance" in axes.get_ylabel()
    for landscape, kind in ((LINE, "contour"), (PLANE, "surface")):
        with pytest.raises(ValueError, match="`trajectory` must be None, except"):
            draw_landscapes({"a": landscape}, trajectory=path, kind=kind)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.geomspace(0.009, 20, 500), [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]),
        (np.geomspace(1e-7, 20, 500), [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10]),
        (np.linspace(-1, 1, 500), np.arange(-0.8, 1, 0.2)),
        (np.linspace(5, 6, 500), np.arange(5.1, 5.95, 0.1)),
    ],
)
def test_levels_are_round_and_spread_over_the_losses(
    losses: Any, expected: Any
) -> None:
    np.testing.assert_allclose(levels_of(losses, log=True), expected, atol=1e-12)


@pytest.mark.parametrize("losses", [np.ones(9), np.zeros(9), np.array([1, 1.0001])])
def test_a_flat_plane_has_levels(losses: Any) -> None:
    levels = levels_of(losses, log=True)
    assert len(levels) >= 3
    assert (np.diff(levels) > 0).all()


def test_losses_that_overflow_are_drawn() -> None:
    losses = PLANE.losses.copy()
    losses[0, 0], losses[4, 4] = np.inf, np.nan
    plane = Landscape(coordinates=PLANE.coordinates, losses=losses)
    for kind in ("contour", "surface"):
        plane.plot(kind=kind).canvas.draw()
    nothing = Landscape(coordinates=(X, X), losses=np.full((5, 5), np.inf))
    with pytest.raises(ValueError, match="must have finite losses"):
        nothing.plot()


def test_the_density_is_drawn(tmp_path: Any) -> None:
    x, y = image_data(32)
    density = hessian_density(cnn(), x, y, num_samples=2, num_steps=5)
    points = np.linspace(-5, 5, 2001)
    values = density.density(points, bandwidth=0.05)
    assert np.trapezoid(values, points) == pytest.approx(1, abs=1e-3)
    figure = density.plot(tmp_path / "density.png")
    assert len(figure.axes[0].lines) == 1
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


def test_saved_and_drawn(tmp_path: Path) -> None:
    x, y = image_data(16)
    plane = loss_landscape(cnn(), x, y, num_points=3)
    plane.save(tmp_path / "plane.npz")
    loaded = Landscape.load(tmp_path / "plane.npz")
    np.testing.assert_array_equal(loaded.losses, plane.losses)
    line = loss_landscape(cnn(), x, y, directions=1, num_points=3)
    for name, drawn in (
        ("contour.png", plane.plot(tmp_path / "contour.png")),
        ("surface.png", plane.plot(tmp_path / "surface.png", kind="surface")),
        ("line.png", line.plot(tmp_path / "line.png")),
    ):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        # Contours have a colour bar.
        assert len(drawn.axes) == 1 + (name == "contour.png")
    several = draw_landscapes({"a": plane, "b": loaded}, tmp_path / "both.png")
    assert [axes.get_title() for axes in several.axes] == ["a", "b", ""]
    curves = draw_landscapes({"a": line, "b": line})
    assert len(curves.axes[0].lines) == 2
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="`landscapes` must all have one direction"):
        draw_landscapes({"a": line, "b": plane})
