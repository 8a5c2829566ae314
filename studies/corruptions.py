"""Test inputs that are made worse, in five strengths."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[Any]
Corruption = Callable[[Array, float, np.random.Generator], Array]


def noisy(x: Array, strength: float, rng: np.random.Generator) -> Array:
    """Gaussian noise; its deviation is a share of the range of pixels.

    Sequences have no range: there it is a share of the deviation of the values.
    """
    scale = np.ptp(x) if is_images(x) else x.std()
    noise = strength * scale * rng.standard_normal(x.shape, "float32")
    return np.clip(x + noise, x.min(), x.max()) if is_images(x) else x + noise


def blurred(x: Array, strength: float, rng: np.random.Generator) -> Array:
    """Images blurred by a Gaussian with a deviation of `strength` pixels."""
    return gaussian_filter(x, (0, strength, strength, 0))


def pale(x: Array, strength: float, rng: np.random.Generator) -> Array:
    """Images whose contrast to their own mean is `strength`, a share."""
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + strength * (x - mean)


def shifted(x: Array, strength: float, rng: np.random.Generator) -> Array:
    """Images shifted by `strength` pixels along both axes, each way at random.

    Darkness comes in from the edge. Sequences are rotated.
    """
    for axis in range(1, x.ndim - 1):
        length = x.shape[axis]
        shifts = int(strength) * rng.choice([-1, 1], size=(len(x), 1))
        places = np.arange(length) + shifts
        others = [i for i in range(1, x.ndim) if i != axis]
        moved = np.take_along_axis(x, np.expand_dims(places % length, others), axis)
        if is_images(x):
            is_outside = np.expand_dims((places < 0) | (places >= length), others)
            moved = np.where(is_outside, x.min(), moved)
        x = moved
    return x


def is_images(x: Array) -> bool:
    """Whether inputs are images `(n, height, width, channels)`, and not sequences."""
    return x.ndim == 4


# Strengths from weak to strong.
OF_IMAGES: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (noisy, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "blur": (blurred, (0.5, 0.75, 1.0, 1.25, 1.5)),
    "contrast": (pale, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "shift": (shifted, (1, 2, 3, 4, 5)),
}
OF_SEQUENCES: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (noisy, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "shift": (shifted, (1, 2, 3, 4, 5)),
}


def corrupted(x: Array, seed: int = 0) -> dict[str, list[Array]]:
    """The inputs by kind of corruption, in each strength.

    Args:
        x: Images of shape `(n, height, width, channels)`, of which some pixel is black
            and some is white, in any units; or sequences `(n, length, channels)`.
        seed: Seed of what is random.

    Returns:
        For each kind, inputs of the same shape, from the weakest to the strongest.
    """
    rng = np.random.default_rng(seed)
    kinds = OF_IMAGES if is_images(x) else OF_SEQUENCES
    return {
        kind: [function(x, strength, rng).astype("float32") for strength in strengths]
        for kind, (function, strengths) in kinds.items()
    }
