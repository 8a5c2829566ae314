"""Fashion-MNIST from files at hand as a TensorFlow Datasets builder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from keras_nrs._fashion_mnist import SPLITS
from keras_nrs._fashion_mnist import folder_at_hand
from keras_nrs._fashion_mnist import load_split
from keras_nrs._fashion_mnist import place_of_prepared

_Downloaded: Any = tfds.image_classification.FashionMNIST


class FashionMNIST(_Downloaded, skip_registration=True):  # type: ignore[call-arg, misc]
    """TFDS's set, prepared from the set's own files in a folder.

    Args:
        folder: Folder of the files.
        data_dir: Folder of the prepared sets; `None` is TFDS's own.
    """

    def __init__(self, folder: Path, data_dir: str | None = None) -> None:
        super().__init__(data_dir=data_dir)
        self._folder = folder

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = load_split(self._folder, split)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image[..., None], "label": int(label)}


def builder_of(name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a set, or one of files at hand where TFDS would download it.

    Args:
        name: Name of the set.
        data_dir: Folder of the prepared sets, or of Fashion-MNIST's files; `None` is
            TFDS's own.

    Raises:
        As `tfds.builder`.
    """
    builder = tfds.builder(name, data_dir=data_dir)
    if not isinstance(builder, _Downloaded) or builder.is_prepared():
        return builder
    folder = folder_at_hand(data_dir)
    if folder is None:
        return builder
    return FashionMNIST(folder, place_of_prepared(folder, data_dir))
