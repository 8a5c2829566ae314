"""scikit-learn's handwritten digits as a TensorFlow Datasets builder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_IMAGES = 797
_LARGEST_PIXEL = 16


class Digits(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """1,797 images of 8 x 8 in 10 classes, without a download.

    After the import of `keras_nrs.data`, `tfds.load("digits")` has the splits `train`
    (1,000 images) and `test` (797 images), with equal shares of the classes.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Pixels from 0 to 255."}

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        labels = load_digits().target
        train, test = train_test_split(
            np.arange(len(labels)),
            test_size=TEST_IMAGES,
            stratify=labels,
            random_state=0,
        )
        return {
            "train": self._generate_examples(train),
            "test": self._generate_examples(test),
        }

    def _generate_examples(self, indices: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_digits()
        pixels = np.round(digits.images * 255 / _LARGEST_PIXEL).astype("uint8")
        for index in map(int, indices):
            image, label = pixels[index, ..., None], int(digits.target[index])
            yield index, {"image": image, "label": label}
