"""The sequences of MNIST-1D."""

import random

import numpy as np
import pytest

from studies.mnist1d import load_mnist1d

# Arrays alone: the same on each backend.
pytestmark = pytest.mark.only_torch


def test_sequences_are_normalized_and_of_all_digits() -> None:
    x, y = load_mnist1d(200, 0)
    assert (x.shape, x.dtype, y.shape) == ((200, 40, 1), np.float32, (200,))
    np.testing.assert_array_equal(np.bincount(y), np.full(10, 20))
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)
    # In random order.
    assert len(set(y[:20])) > 5


def test_a_seed_gives_sequences_of_its_own() -> None:
    first, second = load_mnist1d(50, 1), load_mnist1d(50, 2)
    assert load_mnist1d(50, 1)[0] is first[0]
    load_mnist1d.cache_clear()
    again = load_mnist1d(50, 1)
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(again[1], first[1])
    rows = {row.tobytes() for row in first[0]}
    assert not rows & {row.tobytes() for row in second[0]}


def test_generators_of_the_program_go_on() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    load_mnist1d.cache_clear()
    load_mnist1d(20, 0)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize("number", [0, 15])
def test_a_number_of_samples_must_suit_the_classes(number: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 10.*num_samples={number}"):
        load_mnist1d(number, 0)
