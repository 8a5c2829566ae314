"""Augmentations of batches of images, as functions of random numbers.

Keras's layers draw from a state of their own, and `RandomCrop` draws one position for a
whole batch. Here random numbers depend on a seed alone, so that interrupted training
goes on with the same images.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import tensorflow as tf

Tensor = Any

PADDING = 4
CUTOUT_SIZE = 16
# Side of an image that is resized for evaluation, relative to the side of its crop.
RESIZED_TO_CROPPED = 256 / 224


class Draws:
    """Random numbers for the samples of a batch.

    The numbers of a sample do not depend on the number of processes.

    Args:
        seed: Integers of shape `(2,)`.
        batch_size: Number of samples in all processes.
        rows: Positions of this process's samples in the batch, of shape `(n,)`.
    """

    def __init__(self, seed: Tensor, batch_size: int, rows: Tensor) -> None:
        self._seed, self._num_drawn = seed, 0
        self._batch_size, self._rows = batch_size, rows

    def _next_seed(self) -> Tensor:
        self._num_drawn += 1
        return tf.random.experimental.stateless_fold_in(self._seed, self._num_drawn)

    def integers(self, stop: Tensor) -> Tensor:
        """An integer in `[0, stop)` for each sample, of shape `(n,)`."""
        drawn = tf.random.stateless_uniform(
            [self._batch_size], self._next_seed(), 0, stop, dtype=tf.int32
        )
        return tf.gather(drawn, self._rows)

    def integer(self, stop: Tensor) -> Tensor:
        """An integer in `[0, stop)` for the batch, of shape `(1,)`."""
        return tf.random.stateless_uniform([1], self._next_seed(), 0, stop, tf.int32)

    def beta(self, concentration: float) -> Tensor:
        """A number in [0, 1] for the batch, from Beta(concentration, concentration)."""
        gamma = tf.random.stateless_gamma([2], self._next_seed(), concentration)
        return gamma[0] / tf.reduce_sum(gamma)


def crop(images: Tensor, top: Tensor, left: Tensor, mode: str = "CONSTANT") -> Tensor:
    """Crop each image, padded by 4 pixels on each side, to its own size.

    Args:
        images: Images of shape `(n, height, width, channels)`.
        top, left: Position of the crop in the padded image, integers of shape `(n,)` in
            `[0, 8]`.
        mode: `"CONSTANT"` pads with zeros, `"REFLECT"` with the image's mirror image.

    Returns:
        Images of the same shape.
    """
    _, height, width, _ = images.shape
    top, left = tf.cast(top, tf.int32), tf.cast(left, tf.int32)
    sides = [PADDING, PADDING]
    padded = tf.pad(images, [[0, 0], sides, sides, [0, 0]], mode)
    rows = tf.gather(padded, top[:, None] + tf.range(height), axis=1, batch_dims=1)
    return tf.gather(rows, left[:, None] + tf.range(width), axis=2, batch_dims=1)


def flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    """Mirror images left to right where `is_flipped`, of shape `(n,)`, is true."""
    return tf.where(is_flipped[:, None, None, None], images[:, :, ::-1], images)


def cut_out(images: Tensor, y: Tensor, x: Tensor, size: int = CUTOUT_SIZE) -> Tensor:
    """Set a square of each image to zero (DeVries and Taylor, 2017).

    Args:
        images: Normalized images of shape `(n, height, width, channels)`.
        y, x: Center of the square, integers of shape `(n,)`, or `(1,)` for the same
            one in all images. A square near a border ends there.
        size: Side of the square, in pixels.

    Returns:
        Images of the same shape.
    """

    def is_inside(center: Tensor, length: int) -> Tensor:
        start = tf.cast(center, tf.int32)[:, None] - size // 2
        pixels = tf.range(length)
        return (pixels >= start) & (pixels < start + size)

    rows = is_inside(y, images.shape[1])[:, :, None, None]
    columns = is_inside(x, images.shape[2])[:, None, :, None]
    return tf.where(rows & columns, tf.zeros([], images.dtype), images)


def mix_up(images: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Average each sample with the one before it (Zhang et al., 2018).

    Args:
        images: Images of shape `(n, height, width, channels)`, in random order.
        labels: Probabilities of shape `(n, num_classes)`.
        weight: Weight of the sample itself, a number in [0, 1].

    Returns:
        Images and labels of the same shapes.
    """

    def mixed(tensor: Tensor) -> Tensor:
        return weight * tensor + (1 - weight) * tf.roll(tensor, 1, axis=0)

    return mixed(images), mixed(labels)


def random_resized_crop(image: Tensor, seed: Tensor, size: int) -> Tensor:
    """A random part of an image, resized (Szegedy et al., 2015).

    The part has 8 to 100 % of the area, and a width of 3/4 to 4/3 of its height.

    Args:
        image: Pixels from 0 to 255, of shape `(height, width, channels)`.
        seed: Integers of shape `(2,)`.
        size: Height and width of the result, in pixels.

    Returns:
        Pixels of shape `(size, size, channels)`, uint8.
    """
    begin, lengths, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        area_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return _resize(tf.slice(image, begin, lengths), size, size)


def resized_center_crop(image: Tensor, size: int) -> Tensor:
    """The center of an image whose shorter side is resized to 8/7 of `size`.

    Arguments and result have the shapes and units of `random_resized_crop`.
    """
    shape = tf.shape(image)
    scale = size * RESIZED_TO_CROPPED / tf.cast(tf.reduce_min(shape[:2]), tf.float64)
    sides = tf.cast(tf.round(scale * tf.cast(shape[:2], tf.float64)), tf.int32)
    image = _resize(image, sides[0], sides[1])
    top, left = tf.unstack((sides - size) // 2)
    return image[top : top + size, left : left + size]


def _resize(image: Tensor, height: Tensor, width: Tensor) -> Tensor:
    image = tf.image.resize(image, [height, width], "bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


class Augmentation(NamedTuple):
    """The augmentation of a training batch.

    Attributes:
        crops: Whether images are padded by 4 pixels and cropped at random.
        flips: Whether half of the images are mirrored left to right.
        cuts_out: Whether a square of 16 pixels is set to zero.
        mixes: Whether pairs of samples are averaged, with a weight from Beta(1, 1).
        is_released: Whether padding reflects the image, and all images of a batch have
            the same square, as in the authors' released code.
    """

    crops: bool = False
    flips: bool = False
    cuts_out: bool = False
    mixes: bool = False
    is_released: bool = False

    def __call__(
        self,
        pixels: Tensor,
        labels: Tensor,
        draws: Draws,
        normalize: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Normalized images and labels, augmented.

        Args:
            pixels: Pixels from 0 to 255, of shape `(n, height, width, channels)`.
            labels: Probabilities of shape `(n, num_classes)`.
            draws: Random numbers for these samples.
            normalize: A function from pixels to normalized images.
        """
        _, height, width, _ = pixels.shape
        if self.crops:
            stop = 2 * PADDING + 1
            mode = "REFLECT" if self.is_released else "CONSTANT"
            pixels = crop(pixels, draws.integers(stop), draws.integers(stop), mode)
        if self.flips:
            pixels = flip(pixels, draws.integers(2) == 1)
        images = normalize(pixels)
        if self.cuts_out:
            draw = draws.integer if self.is_released else draws.integers
            images = cut_out(images, draw(height), draw(width))
        if self.mixes:
            images, labels = mix_up(images, labels, draws.beta(1.0))
        return images, labels


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flips=True),
    "basic": Augmentation(crops=True, flips=True),
    "cutout": Augmentation(crops=True, flips=True, cuts_out=True),
    "heavy": Augmentation(crops=True, flips=True, mixes=True),
}
