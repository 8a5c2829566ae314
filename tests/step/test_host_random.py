"""The random generators of Python and NumPy."""

import random

import numpy as np

from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state


def draws() -> tuple[float, float]:
    return random.random(), np.random.random()  # noqa: NPY002


def test_draws_are_repeated_and_go_on_as_without_the_repetition() -> None:
    first = host_random_state()
    expected = draws()
    second = host_random_state()
    with drawing_from(first):
        assert draws() == expected
    following = draws()
    with drawing_from(second):
        assert draws() == following
