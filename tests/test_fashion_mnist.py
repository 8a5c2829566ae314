"""Fashion-MNIST's files, whole and damaged."""

import gzip
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_nrs._fashion_mnist import folder_at_hand
from keras_nrs._fashion_mnist import load_fashion_mnist
from keras_nrs._files import DamagedFileError
from tests.support.fashion_mnist import idx
from tests.support.fashion_mnist import use_small_set
from tests.support.fashion_mnist import write_fashion_mnist

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_small_set(monkeypatch, tmp_path / "debian")
    return tmp_path / "files"


@pytest.mark.parametrize("is_packed", [True, False])
def test_arrays_are_those_of_the_files(folder: Path, is_packed: bool) -> None:
    write_fashion_mnist(folder, is_packed=is_packed)
    (x_train, y_train), (x_test, y_test) = load_fashion_mnist(folder)
    rng = np.random.default_rng(0)
    for images, labels, count in ((x_train, y_train, 40), (x_test, y_test, 20)):
        expected = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, np.arange(count) % 10)
        assert images.dtype == labels.dtype == np.uint8


def test_arrays_are_those_of_keras(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which reads files in its cache, and checks nothing."""
    cache = tmp_path / "debian" / "keras" / "datasets" / "fashion-mnist"
    write_fashion_mnist(cache)
    module = keras.src.datasets.fashion_mnist
    monkeypatch.setattr(module, "get_file", lambda name, **_: str(cache / name))
    assert folder_at_hand() == cache
    pairs = zip(load_fashion_mnist(), module.load_data(), strict=True)
    for found, expected in pairs:
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_the_given_folder_is_first_and_then_debians(
    folder: Path, tmp_path: Path
) -> None:
    assert folder_at_hand(folder) is None
    write_fashion_mnist(tmp_path / "debian")
    assert folder_at_hand(folder) == folder_at_hand() == tmp_path / "debian"
    write_fashion_mnist(folder)
    assert folder_at_hand(folder) == folder


def test_keras_downloads_what_is_in_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: "loaded")
    assert load_fashion_mnist() == "loaded"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (IMAGES, lambda data: gzip.compress(data)[:-30], "ended before"),
        (IMAGES, lambda data: data, "Not a gzipped file"),
        (IMAGES, lambda data: gzip.compress(data[:-1]), "31359 pixels.* of 31360"),
        (IMAGES, lambda data: gzip.compress(data[:7]), "does not begin as an idx"),
        (IMAGES, lambda data: gzip.compress(b"\0\0\x0d" + data[3:]), "00000d03"),
        (
            IMAGES,
            lambda _: gzip.compress(idx(np.zeros((39, 28, 28), np.uint8))),
            r"\(39, 28, 28\), that of Fashion-MNIST \(40, 28, 28\)",
        ),
        (
            LABELS,
            lambda _: gzip.compress(idx(np.full(20, 10, np.uint8))),
            "the label 10",
        ),
    ],
)
def test_a_damaged_file_is_named(
    folder: Path, name: str, change: Callable[[bytes], bytes], match: str
) -> None:
    write_fashion_mnist(folder)
    path = folder / name
    path.write_bytes(change(gzip.decompress(path.read_bytes())))
    with pytest.raises(DamagedFileError, match=f"(?s){name}.*{match}"):
        load_fashion_mnist(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    write_fashion_mnist(folder)
    (folder / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=LABELS):
        load_fashion_mnist(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_fashion_mnist(folder / "nowhere")
