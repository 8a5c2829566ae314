"""Image classification sets of TensorFlow Datasets as batches for `model.fit()`."""

import contextlib
import difflib
import functools
import io
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs._image_settings import check_image_settings
from keras_nrs.data.augmentation import AUGMENTATIONS
from keras_nrs.data.augmentation import CUTOUT_SIZE
from keras_nrs.data.augmentation import PADDING
from keras_nrs.data.augmentation import Draws
from keras_nrs.data.augmentation import random_resized_crop
from keras_nrs.data.augmentation import resized_center_crop
from keras_nrs.data.digits import Digits
from keras_nrs.data.fashion_mnist import FashionMNIST
from keras_nrs.data.fashion_mnist import builder_of

Tensor = Any

# Mean and standard deviation of each channel of the training images, in [0, 1].
MOMENTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# The test splits of these sets have no public labels.
_TEST_SPLITS = {"imagenet2012": "validation", "places365_small": "validation"}
# Training sets up to this size are kept in memory and shuffled as a whole.
_CACHED_BYTES = 2**30
_SHUFFLED_IMAGES = 16_384
# As many images are read at once for the moments.
_READ_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Batches of normalized images `(batch, height, width, channels)` and labels.

    Labels are probabilities `(batch, num_classes)`, for `CategoricalCrossentropy`. The
    batch of a training step depends on the seed, the epoch and the step alone, not on
    interruptions, nor on the number of processes.

    Args:
        name: Name of a set in TensorFlow Datasets with the features `image` and
            `label`, or `"digits"`, which needs no download. `"fashion_mnist"` needs
            none if its files are in `data_dir`, in Debian's package
            `dataset-fashion-mnist` or in Keras's cache.
        batch_size: Training samples in a step, in all processes together. An epoch
            leaves out samples that do not fill a batch.
        augmentation: `"none"`; `"flip"`; `"basic"` (pad by 4 pixels, random crop,
            flip); `"cutout"` (basic, and a square of 16 pixels set to zero);
            `"heavy"` (basic and mixup).
        source: `"paper"` pads with zeros, and cuts a square out of each image.
            `"released"` is the authors' released code: it pads with the image's mirror
            image, and cuts the same square out of all images of a batch.
        image_size: Height and width to which images are resized. Training takes random
            parts of images (8 to 100 % of the area), evaluation takes their centers.
            `None` keeps the size, which must be the same for all images.
        label_smoothing: Share of a training label that goes to all classes equally.
        validation_percent: Percentage of the training images that is held out, from the
            end of the split: an integer from 0 to 90.
        seed: Seed of the order and the augmentation.
        num_shards, shard_index: Number of processes, and the index of this process.
            Each process trains on its share of each batch, in the order of the indices,
            and evaluates all samples.
            With several processes, train under
            `keras.distribution.DataParallel(auto_shard_dataset=False)`.
        data_dir: Folder of the prepared sets. Defaults to TensorFlow Datasets' own.
            May be a folder with Fashion-MNIST's four files.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from keras_nrs.data import ImageData
        >>> data = ImageData(name="digits", batch_size=100)
        >>> images, labels = next(iter(data.train()))
        >>> images.shape, labels.shape, data.steps_per_epoch
        (TensorShape([100, 8, 8, 1]), TensorShape([100, 10]), 10)
    """

    name: str
    batch_size: int = 128
    augmentation: str = "none"
    source: str = "paper"
    image_size: int | None = None
    label_smoothing: float = 0.0
    validation_percent: int = 0
    seed: int = 0
    num_shards: int = 1
    shard_index: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        check_image_settings(
            augmentation=self.augmentation,
            source=self.source,
            image_size=self.image_size,
            label_smoothing=self.label_smoothing,
            validation_percent=self.validation_percent,
            batch_size=self.batch_size,
        )
        check_seed("seed", self.seed)
        check_int("num_shards", self.num_shards, minimum=1)
        check_int("shard_index", self.shard_index, 0, self.num_shards - 1)
        if self.batch_size % self.num_shards:
            raise ValueError(
                f"`batch_size` must be a multiple of num_shards={self.num_shards}. "
                f"Received: batch_size={self.batch_size}."
            )
        self._check_features()
        check_int("batch_size", self.batch_size, 1, self.num_train)
        splits = list(self._builder.info.splits)
        if splits and self._split_name("test") not in splits:
            raise ValueError(
                "`name` must be a set with a split 'test' or 'validation'. Received: "
                f"name={self.name!r}, whose splits are {splits}."
            )
        if self.num_shards > 1 and AUGMENTATIONS[self.augmentation].mixes:
            raise ValueError(
                f"augmentation={self.augmentation!r} mixes the samples of a batch, so "
                f"it needs num_shards=1. Received: num_shards={self.num_shards}."
            )
        crops = AUGMENTATIONS[self.augmentation].crops
        is_small = min(self.image_shape[:2]) <= PADDING
        if self.source == "released" and crops and is_small:
            raise ValueError(
                f"source='released' pads with {PADDING} pixels of the mirror image, so "
                f"it needs larger images. Received: images of shape {self.image_shape}."
                " Use 'paper', or a larger image_size."
            )
        cuts_out = AUGMENTATIONS[self.augmentation].cuts_out
        if cuts_out and min(self.image_shape[:2]) <= CUTOUT_SIZE:
            raise ValueError(
                f"augmentation='cutout' clears squares of {CUTOUT_SIZE} pixels, which "
                f"cover whole images of {self.name!r}. Received: images of shape "
                f"{self.image_shape}. Use 'basic', or a larger image_size."
            )

    def _check_features(self) -> None:
        features = self._builder.info.features
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        for feature, kind in kinds.items():
            if not isinstance(dict(features).get(feature), kind):
                raise ValueError(
                    "`name` must be a set with the features 'image' and 'label', one "
                    f"class for each image. Received: name={self.name!r} with the "
                    f"features {sorted(features)}."
                )
        if None in features["image"].shape[:2] and self.image_size is None:
            raise ValueError(
                f"`image_size` must be the size to which the images of {self.name!r} "
                "are resized, such as 224, because they differ in size. Received: "
                "image_size=None."
            )

    @functools.cached_property
    def _builder(self) -> Any:
        try:
            return builder_of(self.name, self.data_dir)
        except (tfds.core.registered.DatasetNotFoundError, TypeError, ValueError):
            names = tfds.list_builders(with_community_datasets=False)
            similar = difflib.get_close_matches(str(self.name), names)
            raise ValueError(
                "`name` must be a set of TensorFlow Datasets, such as 'cifar10'. "
                f"Received: name={self.name!r}. Similar names: {similar}."
            ) from None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self._builder.info.features["label"].num_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images of a batch."""
        height, width, channels = self._builder.info.features["image"].shape
        size = self.image_size
        return (height, width, channels) if size is None else (size, size, channels)

    @functools.cached_property
    def num_train(self) -> int:
        """Number of training images."""
        return int(self._train_samples.cardinality())

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches in an epoch."""
        return self.num_train // self.batch_size

    @functools.cached_property
    def moments(self) -> tuple[Any, Any]:
        """Mean and standard deviation of each channel, with pixels in [0, 1].

        Published values for CIFAR, Fashion-MNIST and ImageNet. For other sets all
        training images are read.
        """
        if self._builder.name in MOMENTS:
            published_mean, published_std = MOMENTS[self._builder.name]
            return np.array(published_mean, "f4"), np.array(published_std, "f4")
        samples = self._train_samples
        if self.image_size is None:  # They are decoded, and equally large.
            samples = samples.batch(_READ_IMAGES)
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for sample in tfds.as_numpy(samples):
            image = sample["image"]
            if isinstance(image, bytes):
                image = self._decode_image(image).numpy()
            pixels = image.reshape(-1, image.shape[-1]) / 255.0
            count += len(pixels)
            total = total + pixels.sum(0)
            squares = squares + (pixels**2).sum(0)
        mean = total / count
        # Where the deviation is 0, the channel is constant and stays constant.
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return mean.astype("float32"), np.where(std > 0, std, 1).astype("float32")

    def train(
        self, first_epoch: int = 0, steps_per_epoch: int | None = None
    ) -> tf.data.Dataset:
        """The training batches of all epochs from `first_epoch` on, without end.

        Sets of up to 1 GiB are kept in memory and shuffled as a whole. Larger sets, and
        sets whose images are resized, are shuffled by 16,384 images at a time, in the
        random order in which TFDS writes them.

        Args:
            first_epoch: Index of an epoch, counted from 0.
            steps_per_epoch: Batches in an epoch, also an argument of `fit()`. Defaults
                to `data.steps_per_epoch`, which is all of them.
        """
        check_int("first_epoch", first_epoch, minimum=0)
        steps = self.steps_per_epoch if steps_per_epoch is None else steps_per_epoch
        check_int("steps_per_epoch", steps, 1, self.steps_per_epoch)
        samples = self._train_samples
        height, width, channels = self.image_shape
        is_small = height * width * channels * self.num_train <= _CACHED_BYTES
        num_shuffled = _SHUFFLED_IMAGES
        if is_small and self.image_size is None:
            samples = samples.cache()
            # More than all images, so that the cache is read to its end.
            num_shuffled = self.num_train + 1
        seed = tf.constant([self.seed, 0])
        _ = self.moments  # Computed here, because below is code of a graph.

        def batches_of_epoch(epoch: Tensor) -> tf.data.Dataset:
            # Fixes the graph's seed, so that the program's seed has no effect.
            tf.compat.v1.set_random_seed(1)
            epoch_seed = tf.random.experimental.stateless_fold_in(seed, epoch)
            shuffled = samples.shuffle(
                num_shuffled,
                seed=tf.random.stateless_uniform([], epoch_seed, None, None, tf.int64),
                reshuffle_each_iteration=False,
            ).take(steps * self.batch_size)
            return self._training_batches(shuffled, epoch_seed)

        epochs = tf.data.Dataset.range(first_epoch, np.iinfo("int32").max)
        return _with_fixed_order(epochs.flat_map(batches_of_epoch))

    def train_images(self) -> tf.data.Dataset:
        """The batches of the training split, in order and without augmentation."""
        return self._evaluation_batches("train")

    def validation(self) -> tf.data.Dataset | None:
        """The batches of the held out images, `None` without `validation_percent`."""
        if not self.validation_percent:
            return None
        return self._evaluation_batches("validation")

    def test(self) -> tf.data.Dataset:
        """The batches of the test split, or of ImageNet's validation split."""
        return self._evaluation_batches("test")

    def _training_batches(self, samples: Any, seed: Tensor) -> tf.data.Dataset:
        augmentation = AUGMENTATIONS[self.augmentation]._replace(
            is_released=self.source == "released"
        )
        local_size = self.batch_size // self.num_shards
        rows = self.shard_index * local_size + tf.range(local_size)

        def resized(position: Tensor, sample: Any) -> Any:
            draw = tf.random.experimental.stateless_fold_in(seed, position)
            image = self._decode_image(sample["image"])
            image = random_resized_crop(image, draw, self.image_shape[0])
            return sample | {"image": image}

        def augmented(step: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            # Below zero, because the positions of samples are >= 0.
            draw = tf.random.experimental.stateless_fold_in(seed, -1 - step)
            pixels = tf.ensure_shape(batch["image"], (local_size, *self.image_shape))
            labels = self._one_hot(batch["label"], self.label_smoothing)
            draws = Draws(draw, self.batch_size, rows)
            return augmentation(pixels, labels, draws, self._normalized)

        def is_own(position: Tensor, sample: Any) -> Tensor:
            return position // local_size % self.num_shards == self.shard_index

        positions = samples.enumerate()
        if self.num_shards > 1:
            positions = positions.filter(is_own)
        if self.image_size is None:
            shard = positions.map(lambda _, sample: sample)
        else:
            shard = positions.map(resized, tf.data.AUTOTUNE)
        batches = shard.batch(local_size, drop_remainder=True).enumerate()
        return batches.map(augmented, tf.data.AUTOTUNE)

    def _evaluation_batches(self, part: str) -> tf.data.Dataset:
        samples = self._split_samples(part)
        _ = self.moments
        if self.image_size is not None:
            size = self.image_size

            def resized(sample: Any) -> Any:
                image = self._decode_image(sample["image"])
                return sample | {"image": resized_center_crop(image, size)}

            samples = samples.map(resized, tf.data.AUTOTUNE)

        def normalized(batch: Any) -> tuple[Tensor, Tensor]:
            pixels = tf.ensure_shape(batch["image"], (None, *self.image_shape))
            tf.debugging.assert_non_negative(
                batch["label"], f"The {part} split of {self.name!r} has no labels."
            )
            return self._normalized(pixels), self._one_hot(batch["label"], 0.0)

        batches = samples.batch(self.batch_size // self.num_shards)
        return _with_fixed_order(batches.map(normalized, tf.data.AUTOTUNE))

    def _normalized(self, pixels: Tensor) -> Tensor:
        mean, std = self.moments
        return (tf.cast(pixels, tf.float32) / 255 - mean) / std

    def _one_hot(self, labels: Tensor, smoothing: float) -> Tensor:
        one_hot = tf.one_hot(labels, self.num_classes)
        return one_hot * (1 - smoothing) + smoothing / self.num_classes

    @functools.cached_property
    def _train_samples(self) -> tf.data.Dataset:
        return self._split_samples("train")

    def _split_samples(self, part: str) -> tf.data.Dataset:
        """A split's samples in a fixed order.

        Images that will be resized are not decoded yet, to save memory.
        """
        self._prepare_files()
        files = {} if self.image_size is None else {"image": tfds.decode.SkipDecoding()}
        return self._builder.as_dataset(
            split=self._split_name(part),
            decoders=tfds.decode.PartialDecoding({"image", "label"}, decoders=files),
        )

    def _decode_image(self, file: Tensor) -> Tensor:
        return self._builder.info.features["image"].decode_example(file)

    def _prepare_files(self) -> None:
        # TFDS prints that it downloads, which sets at hand do not need.
        is_quiet = isinstance(self._builder, Digits | FashionMNIST)
        with contextlib.redirect_stdout(io.StringIO() if is_quiet else sys.stdout):
            self._builder.download_and_prepare()

    def _split_name(self, part: str) -> str:
        if part == "test":
            name = _TEST_SPLITS.get(self._builder.name, "test")
            splits = list(self._builder.info.splits)
            return (
                "validation" if name not in splits and "validation" in splits else name
            )
        first = 100 - self.validation_percent
        if part == "validation":
            return f"train[{first}%:]"
        return f"train[:{first}%]" if self.validation_percent else "train"


def _with_fixed_order(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The data set, in an order that does not depend on the speed of threads."""
    options = tf.data.Options()
    options.deterministic = True
    # Keras's distributions split batches by themselves, unless there are shards.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
