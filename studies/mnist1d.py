"""MNIST-1D (Greydanus and Kobak, 2020), made on this machine.

Needs `pip install "keras-nrs[study]"`.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_CLASSES, LENGTH = 10, 40


@cache
def load_mnist1d(num_samples: int, seed: int) -> tuple[Array, Array]:
    """Sequences in random order, with as many of each digit.

    They are those of the package `mnist1d` with its own settings: one of ten templates
    in noise, padded, stretched, scaled, shifted and sheared.

    Args:
        num_samples: Number of sequences, a multiple of 10.
        seed: Seed. Other seeds give other sequences.

    Returns:
        Sequences of shape `(num_samples, 40, 1)`, float32, all together with mean 0 and
        deviation 1; and labels of shape `(num_samples,)` from 0 to 9. Arrays that
        cannot be written to: calls with the same arguments share them.

    Raises:
        ValueError: if there cannot be as many sequences of each digit.
    """
    if num_samples < NUM_CLASSES or num_samples % NUM_CLASSES:
        raise ValueError(
            f"`num_samples` must be a multiple of {NUM_CLASSES}, because there are as "
            f"many sequences of each digit. Received: num_samples={num_samples!r}."
        )
    from mnist1d.data import get_dataset_args
    from mnist1d.data import make_dataset

    settings = get_dataset_args()
    settings.num_samples, settings.seed, settings.train_split = num_samples, seed, 1.0
    with _global_seeds_kept():
        made = make_dataset(settings)
    x, y = made["x"].astype("float32")[..., None], made["y"].astype("int32")
    x.flags.writeable = y.flags.writeable = False
    return x, y


@contextmanager
def _global_seeds_kept() -> Iterator[None]:
    """Restore the states of the generators that the package seeds."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
