"""Settings of image data that are checked without TensorFlow."""

from typing import Any

import pytest

from keras_nrs._image_settings import AUGMENTATION_NAMES
from keras_nrs._image_settings import check_image_settings

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

GOOD = {
    "augmentation": "none",
    "source": "paper",
    "image_size": None,
    "label_smoothing": 0.1,
    "validation_percent": 10,
    "batch_size": 8,
}


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation": "mixup"},
        {"source": "code"},
        {"image_size": 0},
        {"label_smoothing": 1},
        {"validation_percent": 91},
        {"batch_size": 0},
    ],
)
def test_bad_settings_name_themselves(change: dict[str, Any]) -> None:
    check_image_settings(**GOOD)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*{name}={value!r}"):
        check_image_settings(**GOOD | change)


def test_the_names_are_those_of_the_augmentations() -> None:
    augmentation = pytest.importorskip("keras_nrs.data.augmentation")
    assert set(AUGMENTATION_NAMES) == set(augmentation.AUGMENTATIONS)
