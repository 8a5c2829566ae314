"""Fashion-MNIST from files at hand, without TensorFlow Datasets."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_nrs._files import DamagedFileError

Array = NDArray[np.uint8]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NUM_CLASSES, SIDE = 10, 28
# The split in the names of the files, and its number of images.
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def load_fashion_mnist(
    folder: str | os.PathLike[str] | None = None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Fashion-MNIST, as `keras.datasets.fashion_mnist.load_data()` returns it.

    Args:
        folder: Folder with the set's four files, packed (`train-images-idx3-ubyte.gz`,
            ...) or not. `None` is that of Debian's package `dataset-fashion-mnist`,
            then that of Keras, which downloads what is in neither.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: 60,000 and 10,000 images of shape
        `(28, 28)` with pixels from 0 to 255, and labels from 0 to 9, all uint8.

    Raises:
        FileNotFoundError: if a file is not in the folder.
        DamagedFileError: if the content of a file cannot be right.
    """
    found = Path(folder) if folder is not None else folder_at_hand()
    if found is None:
        import keras  # Not above: commands find files before they import it.

        return keras.datasets.fashion_mnist.load_data()
    return load_split(found, "train"), load_split(found, "test")


def folder_at_hand(data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The first folder with the set's files: `data_dir`, Debian's, Keras's cache."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    folders = [DEBIAN_FOLDER, home / "datasets" / "fashion-mnist"]
    if data_dir is not None:
        folders.insert(0, Path(data_dir))
    return next((f for f in folders if _path(f, "train", "images").exists()), None)


def place_of_prepared(folder: Path, data_dir: str | None) -> str | None:
    """The folder for a set prepared from files in a folder; `None` is TFDS's own.

    Args:
        folder: Folder of the files.
        data_dir: The folder that was asked for. It may be that of the files, in which
            the user cannot write.
    """
    is_of_files = data_dir is not None and folder == Path(data_dir)
    return None if is_of_files and not os.access(folder, os.W_OK) else data_dir


def load_split(folder: Path, split: str) -> tuple[Array, Array]:
    """Images and labels of the split `"train"` or `"test"`, from its files in a folder.

    Returns and raises as `load_fashion_mnist`.
    """
    count = SPLITS[split][1]
    images = _read(_path(folder, split, "images"), (count, SIDE, SIDE))
    path = _path(folder, split, "labels")
    labels = _read(path, (count,))
    if labels.max() >= NUM_CLASSES:
        raise _damaged(path, f"it has the label {labels.max()}, and there are 0 to 9")
    return images, labels


def _path(folder: Path, split: str, content: str) -> Path:
    """The file of a split's images or labels, unpacked if there is no packed one."""
    rank = 3 if content == "images" else 1
    path = folder / f"{SPLITS[split][0]}-{content}-idx{rank}-ubyte"
    packed = path.with_name(f"{path.name}.gz")
    return path if path.exists() and not packed.exists() else packed


def _read(path: Path, shape: tuple[int, ...]) -> Array:
    """The array in an idx file: its type and rank, its shape, its bytes."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, error) from error
    rank, unsigned_bytes = len(shape), 8
    start = 4 * (rank + 1)
    if data[:4] != bytes([0, 0, unsigned_bytes, rank]) or len(data) < start:
        raise _damaged(
            path, f"it does not begin as an idx file of rank {rank}: {data[:4].hex()}"
        )
    found = struct.unpack(f">{rank}I", data[4:start])
    if found != shape:
        raise _damaged(path, f"its shape is {found}, that of Fashion-MNIST {shape}")
    if len(data) - start != math.prod(shape):
        raise _damaged(
            path, f"it has {len(data) - start} pixels or labels of {math.prod(shape)}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, problem: Any) -> DamagedFileError:
    return DamagedFileError(path, problem, "Replace it by the set's own file.")
