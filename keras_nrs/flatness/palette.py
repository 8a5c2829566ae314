"""One colour for each method of training, in all figures.

Each colour has a contrast of at least 3 to white and to a dark page, and the colour-
blind can tell any two apart. Line styles and markers tell variants of a method apart.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

VERMILION, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
VIOLET, BROWN, LAVENDER, GRAY = "#8700FF", "#964B2D", "#9678FF", "#7F7F7F"
# For what has no colour of its own, in this order.
COLORS = (BLUE, VERMILION, GREEN, PINK, VIOLET, BROWN, LAVENDER)
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")

# By the first words of a method's name, in lower case: its colour, and the place of its
# first line style and marker.
METHODS = {
    "nrs": (BLUE, 0),
    "baseline": (VERMILION, 1),
    "plain": (VERMILION, 1),
    "twice": (VERMILION, 1),
    "sgd": (VERMILION, 1),
    "rpr": (GREEN, 2),
    "sam": (PINK, 3),
    "asam": (VIOLET, 0),
    "label smoothing": (BROWN, 1),
    "ema": (LAVENDER, 2),
}


class Style(NamedTuple):
    """How a method is drawn, in words of matplotlib."""

    color: str
    linestyle: str
    marker: str

    @property
    def line(self) -> dict[str, str]:
        """The keyword arguments of a curve."""
        return {"color": self.color, "linestyle": self.linestyle}


def method_of(name: str) -> str | None:
    """The key in `METHODS` of a method's name, `None` if the name is not one's.

    "NRS, relative", "nrs_seed_3" and "NRS" are all "nrs".
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).strip()
    return next((m for m in METHODS if re.match(rf"{m}\b", words)), None)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The styles of what a figure shows.

    Methods have their own colours. Other names get the colours in order, beside methods
    gray first and those that no method in the figure has. What shares a colour differs
    in line style and marker.
    """
    names = list(dict.fromkeys(names))
    own = {name: METHODS[method] for name in names if (method := method_of(name))}
    taken = {color for color, _ in own.values()}
    others = [name for name in names if name not in own]
    order = (GRAY, *reversed(COLORS)) if taken else COLORS
    free = [color for color in order if color not in taken]
    for i, name in enumerate(others):
        own[name] = free[i % len(free)], i
    counts: dict[str, int] = {}
    made = {}
    for name in names:
        color, first = own[name]
        place = first + counts.get(color, 0)
        counts[color] = counts.get(color, 0) + 1
        line, marker = LINES[place % len(LINES)], MARKERS[place % len(MARKERS)]
        made[name] = Style(color, line, marker)
    return made
