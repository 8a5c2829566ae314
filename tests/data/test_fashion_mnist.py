"""Fashion-MNIST's files as a data set of the recipes."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs._fashion_mnist import load_fashion_mnist
from keras_nrs.data import ImageData
from keras_nrs.data import download
from keras_nrs.data.download import check_connection
from keras_nrs.data.fashion_mnist import FashionMNIST
from keras_nrs.data.fashion_mnist import builder_of
from keras_nrs.experiments.recipes import recipes
from tests.support.fashion_mnist import use_small_set
from tests.support.fashion_mnist import write_fashion_mnist

# Arrays and tf.data: the same on each backend.
pytestmark = pytest.mark.only_torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where Debian has the files."""
    use_small_set(monkeypatch, tmp_path / "debian")
    return tmp_path / "debian"


def images_and_labels(dataset: tf.data.Dataset) -> set[tuple[bytes, int]]:
    """Pixels and label of each sample: TFDS has an order of its own."""
    return {
        (np.round((image * 0.353 + 0.286) * 255).astype("uint8").tobytes(), int(label))
        for images, labels in dataset.as_numpy_iterator()
        for image, label in zip(images, labels.argmax(1), strict=True)
    }


@pytest.mark.parametrize("is_given", [True, False])
def test_samples_are_those_of_the_files(
    folder: Path, tmp_path: Path, is_given: bool
) -> None:
    files = tmp_path / "files" if is_given else folder
    write_fashion_mnist(files)
    data = ImageData(
        name="fashion_mnist", batch_size=8, data_dir=str(tmp_path / "files")
    )
    assert (data.num_train, data.image_shape, data.num_classes) == (40, (28, 28, 1), 10)
    train, test = load_fashion_mnist(files)
    for found, (x, y) in ((data.train_images(), train), (data.test(), test)):
        expected = {(i.tobytes(), int(k)) for i, k in zip(x, y, strict=True)}
        assert images_and_labels(found) == expected


def test_files_at_hand_need_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(download, "_problem", asked.append)
    data_dir = str(tmp_path / "data")
    check_connection("fashion_mnist", data_dir, lambda line: None)
    assert len(asked) == 1
    write_fashion_mnist(folder)
    check_connection("fashion_mnist", data_dir, lambda line: None)
    assert len(asked) == 1


def test_a_prepared_set_is_used(folder: Path, tmp_path: Path) -> None:
    write_fashion_mnist(folder)
    data_dir = str(tmp_path / "data")
    first = builder_of("fashion_mnist", data_dir)
    assert isinstance(first, FashionMNIST)
    first.download_and_prepare()
    second = builder_of("fashion_mnist", data_dir)
    assert not isinstance(second, FashionMNIST)
    assert second.is_prepared()
    assert second.info.splits["train"].num_examples == 40


def test_a_damaged_file_is_an_error_of_one_line(folder: Path, tmp_path: Path) -> None:
    write_fashion_mnist(folder)
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"labels"))
    name = "fashion_mnist-wide_resnet_10_1-none-nrs"
    folders = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.build_app(), ["train", name, *folders])
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if "Error" in line]
    assert str(path) in line
    assert "does not begin as an idx file" in line


def test_recipes_have_networks_and_schemes() -> None:
    found = [recipe for name, recipe in recipes().items() if "fashion" in name]
    assert len(found) == 18
    assert {recipe.network for recipe in found} == {
        "wide_resnet_10_1",
        "resnet18",
        "vit_ti",
    }
    of_perturbation = {"perturbation": "filterwise", "eps": 0.3, "normalize": True}
    for recipe in found:
        values = dataclasses.asdict(recipe)
        assert values | of_perturbation == values
