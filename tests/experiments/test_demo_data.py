"""The data of the demo: which set is chosen, and how it is split."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from keras_nrs._digits import load_digits
from keras_nrs.experiments import demo_data
from tests.support.fashion_mnist import COUNTS
from tests.support.fashion_mnist import use_small_set
from tests.support.fashion_mnist import write_fashion_mnist

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the small Fashion-MNIST would be found."""
    use_small_set(monkeypatch, tmp_path / "fashion")
    demo_data._fashion_mnist.cache_clear()
    yield tmp_path / "fashion"
    demo_data._fashion_mnist.cache_clear()


def test_fashion_mnist_is_chosen_where_it_is_found(folder: Path) -> None:
    assert demo_data.choose_data("auto") == "digits"
    write_fashion_mnist(folder)
    assert demo_data.choose_data("auto") == "fashion-mnist"
    assert demo_data.choose_data("fashion-mnist") == "fashion-mnist"
    assert demo_data.choose_data("digits") == "digits"
    assert demo_data.place_of("fashion-mnist") == str(folder)
    assert demo_data.place_of("digits") == "scikit-learn"


def test_sets_that_are_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset-fashion-mnist.*or use 'digits'"):
        demo_data.choose_data("fashion-mnist")
    with pytest.raises(ValueError, match=r"`data` must be one of .* data='mnist'"):
        demo_data.choose_data("mnist")


def test_splits_of_fashion_mnist_are_disjoint_and_stratified(folder: Path) -> None:
    write_fashion_mnist(folder)
    split = demo_data.load_split(data="fashion-mnist", train_images=20, seed=0)
    assert split.x_train.shape == (20, 28, 28, 1)
    assert len(split.x_validation) == COUNTS["train"] - 20
    assert len(split.x_test) == COUNTS["test"]
    np.testing.assert_array_equal(np.bincount(split.y_train), [2] * 10)
    both = np.concatenate([split.x_train, split.x_validation])
    assert len(np.unique(both, axis=0)) == COUNTS["train"]
    other = demo_data.load_split(data="fashion-mnist", train_images=20, seed=1)
    assert not np.array_equal(split.x_train, other.x_train)
    np.testing.assert_array_equal(split.x_test, other.x_test)


@pytest.mark.parametrize("train_images", [10, 100, 900])
def test_splits_are_disjoint_and_complete(train_images: int) -> None:
    _, labels = load_digits()
    parts = demo_data.split_indices(labels, train_images=train_images, seed=3)
    assert [len(part) for part in parts] == [train_images, 1000 - train_images, 797]
    assert sorted(np.concatenate(parts)) == list(range(1797))


def test_splits_are_stratified() -> None:
    _, labels = load_digits()
    share = np.bincount(labels) / len(labels)
    for part in demo_data.split_indices(labels, train_images=100, seed=3):
        counts = np.bincount(labels[part], minlength=10)
        # Rounding in both splits moves each class by less than two images.
        np.testing.assert_array_less(np.abs(counts - share * len(part)), 2)


def test_seeds_share_the_test_images_alone() -> None:
    _, labels = load_digits()
    first, second = (
        demo_data.split_indices(labels, train_images=100, seed=seed) for seed in (0, 1)
    )
    np.testing.assert_array_equal(first[2], second[2])
    assert set(first[0]) != set(second[0])


def test_images_keep_their_labels() -> None:
    split = demo_data.load_split(train_images=50, seed=0)
    images, labels = load_digits()
    train, _, _ = demo_data.split_indices(labels, train_images=50, seed=0)
    np.testing.assert_array_equal(split.x_train, images[train])
    np.testing.assert_array_equal(split.y_train, labels[train])
