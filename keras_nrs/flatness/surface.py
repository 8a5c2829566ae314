"""Surfaces of the loss for an HTML page, which the reader can turn."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_nrs.flatness.planes import COLORMAP
from keras_nrs.flatness.planes import Losses
from keras_nrs.flatness.planes import height_scale
from keras_nrs.flatness.planes import levels_of
from keras_nrs.flatness.planes import pooled

Array = NDArray[Any]

_SCRIPT = Path(__file__).with_name("surface.js")
_NUM_COLORS = 64


def surfaces(landscapes: Mapping[str, Losses], *, label: str) -> str:
    """HTML of one surface for each landscape, on one scale, that turn together.

    Its script needs no network. The height is the logarithm of the loss, if all losses
    are positive.

    Args:
        landscapes: A dict from the names that the page shows to landscapes with two
            directions.
        label: What the losses are, with their unit.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    losses = pooled(landscapes)
    low, high, is_log = height_scale(losses, log=True)

    def height(values: Array) -> Array:
        values = np.log10(values) if is_log else values
        filled = np.nan_to_num(values, nan=high, posinf=high)
        return (filled - low) / (high - low)

    levels = levels_of(losses, log=True)
    # The lowest level is never below the lowest loss, but for rounding.
    shown = levels[np.abs(height(levels) - 0.5) < 0.5 + 1e-9]
    data = {
        "surfaces": [
            {
                "heights": height(np.asarray(a.losses)).clip(0, 1).round(4).tolist(),
                **{
                    axis: np.interp(c, (c.min(), c.max()), (-1, 1)).round(4).tolist()
                    for axis, c in zip("xy", a.coordinates, strict=True)
                },
            }
            for a in landscapes.values()
        ],
        "colors": [
            to_hex(color)
            for color in colormaps[COLORMAP](np.linspace(0, 1, _NUM_COLORS))
        ],
        "ticks": [
            [abs(round(float(height(level)), 4)), f"{level:.3g}"]
            for level in shown[:: -(-len(shown) // 5)]
        ],
        "label": label,
    }
    canvases = "".join(
        '<figure><canvas tabindex="0" role="img" aria-label="Surface of the loss: '
        f'{html.escape(name, quote=True)}"></canvas>'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name in landscapes
    )
    # A text in a script ends at the first "</script>", whatever it is part of.
    text = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<section><div class="surfaces">{canvases}</div>'
        f'<script type="application/json">{text}</script>'
        f"<script>{_SCRIPT.read_text('utf-8')}</script></section>"
    )
