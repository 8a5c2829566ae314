"""Errors that name the labels of a loss."""

import numpy as np
import pytest

from keras_nrs.labels import naming_labels

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch

OUTPUTS = np.zeros((4, 3))


def test_labels_that_fit_keep_the_error_and_get_a_note() -> None:
    with (
        pytest.raises(ZeroDivisionError) as caught,
        naming_labels(np.zeros(4), OUTPUTS),
    ):
        raise ZeroDivisionError
    assert any("Received: y of shape (4,)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("labels", [np.zeros((4, 2)), np.zeros(()), {"a": np.zeros(4)}])
def test_labels_that_cannot_fit_are_an_error_that_names_them(labels: object) -> None:
    with (
        pytest.raises(ValueError, match="`y` must be labels"),
        naming_labels(
            labels, OUTPUTS if not isinstance(labels, dict) else {"b": OUTPUTS}
        ),
    ):
        raise RuntimeError("from a backend")


def test_missing_labels_are_named() -> None:
    """With the error itself: a model's own loss may need none, and fail."""
    with (
        pytest.raises(ValueError, match=r"y=None.* computed: from a backend"),
        naming_labels(None, OUTPUTS),
    ):
        raise RuntimeError("from a backend")


def test_nothing_happens_without_an_error() -> None:
    with naming_labels(None, None):
        pass
