"""The colours of methods."""

import itertools

import numpy as np
import pytest

from keras_nrs.flatness import palette
from keras_nrs.flatness.palette import styles

# Machado et al., 2009: what people with each deficiency see, of linear colours.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(
        values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
    )


def contrast(first: str, second: str) -> float:
    """As the guidelines for accessible web content define it."""
    dark, light = sorted(0.05 + TO_XYZ[1] @ linear(c) for c in (first, second))
    return float(light / dark)


def lab(color: np.ndarray) -> np.ndarray:
    """CIELAB, in which distances are those that are seen."""
    scaled = TO_XYZ @ np.clip(color, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.only_torch
@pytest.mark.parametrize("color", [*palette.COLORS, palette.GRAY])
def test_colours_stand_out_on_light_and_dark_pages(color: str) -> None:
    assert contrast(color, "#FFFFFF") > 3
    assert contrast(color, "#0D1117") > 3


@pytest.mark.only_torch
@pytest.mark.parametrize("vision", VISIONS)
def test_the_colour_blind_tell_colours_apart(vision: str) -> None:
    seen = [lab(np.array(VISIONS[vision]) @ linear(c)) for c in palette.COLORS]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    # 2 is just visible side by side.
    assert min(distances) > 15


@pytest.mark.only_torch
def test_methods_have_the_same_colour_everywhere() -> None:
    for name in ("NRS", "nrs", "NRS, relative", "nrs_seed_3", "NRS, alpha 0"):
        assert styles(["SAM", "other", name])[name].color == palette.BLUE
    assert styles(["ASAM"])["ASAM"].color != styles(["SAM"])["SAM"].color
    assert styles(["sample"])["sample"].color == palette.COLORS[0]
    plain = styles(["plain", "baseline, twice the epochs"])
    assert {style.color for style in plain.values()} == {palette.VERMILION}


@pytest.mark.only_torch
def test_all_of_a_figure_differ() -> None:
    names = ["baseline", "baseline, twice", "NRS", "NRS, relative", "RPR", "SAM", "x"]
    found = styles([*names, "y", "z"])
    assert len(set(found.values())) == len(names) + 2
    others = [found[name].color for name in "xyz"]
    assert len(set(others)) == 3
    assert not set(others) & {found[name].color for name in names[:-1]}
    assert [found[name].color for name in "xy"] == [palette.GRAY, palette.LAVENDER]
    many = styles(map(str, range(20)))
    assert len(many) == 20
    assert styles(["NRS"])["NRS"].line == {"color": palette.BLUE, "linestyle": "-"}
