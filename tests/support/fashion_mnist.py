"""A small Fashion-MNIST, in files as the set's own."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from keras_nrs import _fashion_mnist

COUNTS = {"train": 40, "test": 20}


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as the content of an idx file."""
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_fashion_mnist(folder: Path, *, is_packed: bool = True) -> None:
    """Write the four files, with random pixels and the labels 0 to 9 in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", COUNTS["train"]), ("t10k", COUNTS["test"])):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype("uint8")
        for content, array in (("images", images), ("labels", labels)):
            path = folder / f"{name}-{content}-idx{array.ndim}-ubyte"
            if is_packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))


def use_small_set(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Expect the small set, and find none on this machine but in the folder."""
    names = {"train": "train", "test": "t10k"}
    splits = {split: (names[split], count) for split, count in COUNTS.items()}
    monkeypatch.setattr(_fashion_mnist, "SPLITS", splits)
    monkeypatch.setattr(_fashion_mnist, "DEBIAN_FOLDER", folder)
    monkeypatch.setenv("KERAS_HOME", str(folder / "keras"))
