"""Data pipelines, on the digits and on TFDS's mocked sets."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from keras_nrs.data import ImageData

# Arrays and tf.data: the same on each backend.
pytestmark = pytest.mark.only_torch


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tfds"))


def batches(dataset: tf.data.Dataset, number: int = -1) -> list[Any]:
    return list(dataset.take(number).as_numpy_iterator())


def digits(data_dir: str, **arguments: Any) -> ImageData:
    return ImageData(name="digits", batch_size=100, data_dir=data_dir, **arguments)


def test_pixels_are_those_of_the_digits_normalized(data_dir: str) -> None:
    data = digits(data_dir)
    images, labels = (
        np.concatenate(p) for p in zip(*batches(data.test()), strict=True)
    )
    assert images.shape == (797, 8, 8, 1)
    mean, std = data.moments
    pixels = np.round((images * std + mean) * 255 * 16 / 255).astype(int)
    shipped = load_digits()
    by_pixels = {
        image.tobytes(): label
        for image, label in zip(shipped.images.astype(int), shipped.target, strict=True)
    }
    found = [by_pixels[image[..., 0].tobytes()] for image in pixels]
    np.testing.assert_array_equal(found, labels.argmax(1))
    train = np.concatenate([x for x, _ in batches(data.train_images())])
    np.testing.assert_allclose([train.mean(), train.std()], [0, 1], atol=1e-4)


def test_splits_are_disjoint_and_complete(data_dir: str) -> None:
    data = digits(data_dir, validation_percent=20)
    assert (data.num_train, data.steps_per_epoch) == (800, 8)
    validation = data.validation()
    assert validation is not None
    parts = [batches(d) for d in (data.train_images(), validation, data.test())]
    # Some digits are equal: so these are counts.
    assert [sum(len(x) for x, _ in part) for part in parts] == [800, 200, 797]
    assert digits(data_dir).validation() is None


def test_an_epoch_has_each_image_once_in_an_order_of_its_own(data_dir: str) -> None:
    data = digits(data_dir)
    seen = [x for x, _ in batches(data.train(), 20)]
    first, second = np.concatenate(seen[:10]), np.concatenate(seen[10:])
    assert not np.array_equal(first, second)
    every = np.concatenate([x for x, _ in batches(data.train_images())])
    for epoch in (first, second):
        assert sorted(x.tobytes() for x in epoch) == sorted(x.tobytes() for x in every)


@pytest.mark.parametrize("augmentation", ["basic", "heavy"])
def test_batches_depend_on_seed_epoch_and_step_alone(
    data_dir: str, augmentation: str
) -> None:
    data = digits(data_dir, augmentation=augmentation)
    tf.random.set_seed(0)
    all_epochs = batches(data.train(), 30)
    tf.random.set_seed(1)
    for old, new in zip(all_epochs[20:], batches(data.train(2), 10), strict=True):
        np.testing.assert_array_equal(old[0], new[0])
        np.testing.assert_array_equal(old[1], new[1])
    other = digits(data_dir, augmentation=augmentation, seed=1)
    assert not np.array_equal(batches(other.train(), 1)[0][0], all_epochs[0][0])


def test_shorter_epochs_begin_where_longer_ones_do(data_dir: str) -> None:
    data = digits(data_dir)
    whole, short = batches(data.train(), 20), batches(data.train(0, 3), 6)
    for expected, found in zip([*whole[:3], *whole[10:13]], short, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"augmentation": "cutout", "image_size": 20, "source": "released"},
        pytest.param({"augmentation": "basic"}, marks=pytest.mark.slow),
    ],
)
def test_processes_share_the_batches_of_one(
    data_dir: str, arguments: dict[str, Any]
) -> None:
    whole = batches(digits(data_dir, **arguments).train(1), 3)
    for index in range(2):
        part = digits(data_dir, num_shards=2, shard_index=index, **arguments)
        for expected, found in zip(whole, batches(part.train(1), 3), strict=True):
            for half, both in zip(found, expected, strict=True):
                np.testing.assert_array_equal(half, np.split(both, 2)[index])


@pytest.mark.parametrize(("source", "squares"), [("paper", 100), ("released", 1)])
def test_the_released_code_cuts_one_square_out_of_a_batch(
    data_dir: str, source: str, squares: int
) -> None:
    data = digits(data_dir, augmentation="cutout", image_size=20, source=source)
    cut = [x[..., 0] == 0 for x, _ in batches(data.train(), 2)]
    different = len({square.tobytes() for square in cut[0]})
    # Some centers are equal, or so near a border that squares are.
    assert squares * 0.6 < different <= squares
    assert np.any(cut[0][0] != cut[1][0])


def test_the_released_code_pads_with_the_mirror_image(data_dir: str) -> None:
    found = {}
    for source in ("paper", "released"):
        data = digits(data_dir, augmentation="basic", source=source)
        images, _ = batches(data.train(), 1)[0]
        mean, std = data.moments
        found[source] = np.round((images * std + mean) * 16)
    # The crops are at the same positions: they differ in the frame alone.
    paper, released = found["paper"], found["released"]
    np.testing.assert_array_equal(released[paper != 0], paper[paper != 0])
    assert np.mean(released != 0) > np.mean(paper != 0) + 0.05


def test_smoothed_labels_are_of_training_alone(data_dir: str) -> None:
    data = digits(data_dir, label_smoothing=0.1)
    _, labels = batches(data.train(), 1)[0]
    np.testing.assert_allclose(np.unique(labels), [0.01, 0.91], rtol=1e-6)
    _, labels = batches(data.test(), 1)[0]
    np.testing.assert_array_equal(np.unique(labels), [0, 1])


def test_digits_are_a_set_of_tfds(data_dir: str) -> None:
    images, labels = tfds.as_numpy(
        tfds.load(
            "digits",
            split="train",
            data_dir=data_dir,
            batch_size=-1,
            as_supervised=True,
        )
    )
    assert images.shape == (1000, 8, 8, 1)
    assert images.max() == 255
    assert np.bincount(labels).min() > 90


@pytest.mark.parametrize(
    ("arguments", "shape", "num_classes"),
    [
        ({"name": "cifar10", "augmentation": "cutout"}, (32, 32, 3), 10),
        ({"name": "cifar100", "augmentation": "heavy"}, (32, 32, 3), 100),
        (
            {"name": "imagenet2012", "augmentation": "flip", "image_size": 224},
            (224, 224, 3),
            1000,
        ),
    ],
)
def test_the_papers_sets_load(
    arguments: dict[str, Any], shape: tuple[int, ...], num_classes: int
) -> None:
    with tfds.testing.mock_data(num_examples=20):
        data = ImageData(batch_size=8, **arguments)
        assert (data.steps_per_epoch, data.image_shape) == (2, shape)
        for dataset in (data.train(), data.test()):
            images, labels = batches(dataset, 1)[0]
            assert images.shape == (8, *shape)
            assert labels.shape == (8, num_classes)
            np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "cifar1"}, "`name`.*'cifar1'.*'cifar10'"),
        ({"name": "coco"}, "features 'image' and 'label'.*'coco'"),
        ({"name": "imagenet2012"}, "`image_size`.*differ in size"),
        ({"augmentation": "cutout"}, "cover whole images"),
        ({"augmentation": "much"}, "`augmentation` must be one of"),
        ({"source": "code"}, "`source` must be one of"),
        (
            {"source": "released", "augmentation": "basic", "image_size": 4},
            "mirror image.*larger image_size",
        ),
        ({"batch_size": 2_000}, "`batch_size`.*1 to 1000.*2000"),
        ({"batch_size": 5, "num_shards": 2}, "multiple of num_shards=2"),
        ({"label_smoothing": 1.0}, "`label_smoothing`.*1.0"),
        ({"validation_percent": 95}, "`validation_percent`.*95"),
        ({"num_shards": 2, "shard_index": 2}, "`shard_index`.*2"),
        ({"num_shards": 2, "augmentation": "heavy"}, "mixes.*num_shards=2"),
    ],
)
def test_bad_arguments_are_named(
    data_dir: str, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ImageData(**({"name": "digits", "data_dir": data_dir} | arguments))
