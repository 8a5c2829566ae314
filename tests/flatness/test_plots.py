"""Figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_nrs.flatness import Landscape
from keras_nrs.flatness import draw_landscapes
from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import loss_landscape
from tests.support.data import image_data
from tests.support.networks import cnn


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
        assert len(drawn.axes) == 1
    several = draw_landscapes({"a": plane, "b": loaded}, tmp_path / "both.png")
    assert [axes.get_title() for axes in several.axes] == ["a", "b"]
    curves = draw_landscapes({"a": line, "b": line})
    assert len(curves.axes[0].lines) == 2
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="`landscapes` must all have one direction"):
        draw_landscapes({"a": line, "b": plane})
