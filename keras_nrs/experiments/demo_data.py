"""The data of the demo: scikit-learn's digits, or Fashion-MNIST from files at hand."""

from functools import cache
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from keras_nrs._checks import check_choice
from keras_nrs._digits import load_digits
from keras_nrs._digits import pool_and_test
from keras_nrs._fashion_mnist import DEBIAN_FOLDER
from keras_nrs._fashion_mnist import folder_at_hand
from keras_nrs._fashion_mnist import load_fashion_mnist

Array = NDArray[Any]

DIGITS, FASHION_MNIST = "digits", "fashion-mnist"
AUTO = "auto"
TITLES = {DIGITS: "Handwritten digits", FASHION_MNIST: "Fashion-MNIST"}
# So many that enough images are left for validation.
MAX_TRAIN_IMAGES = {DIGITS: 900, FASHION_MNIST: 50_000}
# As in studies/, whose settings the demo has on Fashion-MNIST.
_FASHION_VALIDATION_IMAGES = 2_000
_FASHION_MEAN, _FASHION_DEVIATION = 0.286, 0.353


class Split(NamedTuple):
    """Images of shape `(n, height, width, 1)` and labels of shape `(n,)`.

    Pixels of the digits are in [0, 1], those of Fashion-MNIST have mean 0 and
    deviation 1.
    """

    x_train: Array
    y_train: Array
    x_validation: Array
    y_validation: Array
    x_test: Array
    y_test: Array


def choose_data(name: str) -> str:
    """The set that a name stands for: `"auto"` is Fashion-MNIST where it is found.

    Raises:
        ValueError: if there is no such set, or its files are not on this machine.
    """
    check_choice("data", name, (AUTO, *TITLES))
    if name == DIGITS:
        return name
    is_found = folder_at_hand() is not None
    if name == FASHION_MNIST and not is_found:
        raise ValueError(
            f"`data` must be a set on this machine. Received: data={name!r}, whose "
            f"files are neither in {str(DEBIAN_FOLDER)!r} nor in Keras's cache. "
            "Install Debian's package dataset-fashion-mnist, or download them with "
            "python -c 'import keras; keras.datasets.fashion_mnist.load_data()', or "
            "use 'digits'."
        )
    return FASHION_MNIST if is_found else DIGITS


def place_of(name: str) -> str:
    """Where a set is read from."""
    found: Path | None = folder_at_hand() if name == FASHION_MNIST else None
    return "scikit-learn" if found is None else str(found)


def split_indices(
    labels: Array, *, train_images: int, seed: int
) -> tuple[Array, Array, Array]:
    """Indices of the digits' training, validation and test images.

    The three parts are disjoint and stratified. All seeds share the test images.
    """
    pool, test = pool_and_test(labels)
    train, validation = train_test_split(
        pool, train_size=train_images, stratify=labels[pool], random_state=seed
    )
    return train, validation, test


def load_split(*, train_images: int, seed: int, data: str = DIGITS) -> Split:
    """The images of a set, split by the seed. All seeds share the test images."""
    if data == FASHION_MNIST:
        return _fashion_split(train_images, seed)
    images, labels = load_digits()
    indices = split_indices(labels, train_images=train_images, seed=seed)
    return Split(*(array[i] for i in indices for array in (images, labels)))


def _fashion_split(train_images: int, seed: int) -> Split:
    (x, y), (x_test, y_test) = _fashion_mnist()
    held_out = min(_FASHION_VALIDATION_IMAGES, len(y) - train_images)
    train, validation = train_test_split(
        np.arange(len(y)),
        train_size=train_images,
        test_size=held_out,
        stratify=y,
        random_state=seed,
    )
    parts = (x[train], y[train], x[validation], y[validation], x_test, y_test)
    return Split(*(a if a.ndim == 1 else _scaled(a) for a in parts))


@cache
def _fashion_mnist() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return load_fashion_mnist()


def _scaled(images: Array) -> Array:
    x = (images[..., None] / 255 - _FASHION_MEAN) / _FASHION_DEVIATION
    return x.astype("float32")
