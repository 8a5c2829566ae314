"""scikit-learn's handwritten digits."""

import numpy as np
import pytest
from sklearn import datasets

from keras_nrs._digits import load_digits
from keras_nrs._digits import pool_and_test

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_images_are_scaled_and_keep_their_labels() -> None:
    images, labels = load_digits()
    shipped = datasets.load_digits()
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_array_equal(16 * images[..., 0], shipped.images)
    np.testing.assert_array_equal(labels, shipped.target)


def test_the_split_is_always_the_same() -> None:
    _, labels = load_digits()
    pool, test = pool_and_test(labels)
    assert (len(pool), len(test)) == (1000, 797)
    assert sorted([*pool, *test]) == list(range(1797))
    for first, again in zip((pool, test), pool_and_test(labels), strict=True):
        np.testing.assert_array_equal(first, again)
