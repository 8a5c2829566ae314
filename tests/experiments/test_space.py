"""What a sweep varies."""

import pytest

from keras_nrs.experiments.space import Range
from keras_nrs.experiments.space import parse_space

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_parse_space() -> None:
    entries = ["perturbation=ball,relative", "eps=0.01:1:log", "batch_size=8:64"]
    assert parse_space(entries) == {
        "perturbation": ["ball", "relative"],
        "eps": Range(0.01, 1, log=True),
        "batch_size": Range(8, 64),
    }
