"""scikit-learn's handwritten digits, which need no download."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split

Array = NDArray[Any]

NUM_CLASSES = 10


def load_digits() -> tuple[Array, Array]:
    """Images and labels.

    Returns:
        Images of shape `(1797, 8, 8, 1)` in [0, 1], and labels of shape `(1797,)` from
        0 to 9.
    """
    digits = datasets.load_digits()
    return digits.images.astype("float32")[..., None] / 16, digits.target


def pool_and_test(labels: Array) -> tuple[Array, Array]:
    """Indices of 1,000 images to train with and of the 797 test images.

    The split is stratified, and the same at every call: whoever chooses settings must
    not have seen the test images.
    """
    pool, test = train_test_split(
        np.arange(len(labels)), test_size=797, stratify=labels, random_state=0
    )
    return pool, test
