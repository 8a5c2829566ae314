"""The settings of image data that can be checked without TensorFlow, thus at once."""

from typing import Any

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_rate

AUGMENTATION_NAMES = ("none", "flip", "basic", "cutout", "heavy")
SOURCES = ("paper", "released")
_MOST_HELD_OUT = 90


def check_image_settings(
    *,
    augmentation: Any,
    source: Any,
    image_size: Any,
    label_smoothing: Any,
    validation_percent: Any,
    batch_size: Any,
) -> None:
    """Check arguments of `keras_nrs.data.ImageData`, which describes them.

    Raises:
        TypeError, ValueError: if an argument is not as described there.
    """
    check_int("batch_size", batch_size, minimum=1)
    check_choice("augmentation", augmentation, AUGMENTATION_NAMES)
    check_choice("source", source, SOURCES)
    if image_size is not None:
        check_int("image_size", image_size, minimum=1)
    check_rate("label_smoothing", label_smoothing)
    check_int("validation_percent", validation_percent, 0, _MOST_HELD_OUT)
