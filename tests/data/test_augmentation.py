"""Augmentations, pixel by pixel."""

from typing import Literal

import numpy as np
import pytest
import tensorflow as tf

from keras_nrs.data.augmentation import AUGMENTATIONS
from keras_nrs.data.augmentation import Draws
from keras_nrs.data.augmentation import crop
from keras_nrs.data.augmentation import cut_out
from keras_nrs.data.augmentation import flip
from keras_nrs.data.augmentation import mix_up
from keras_nrs.data.augmentation import random_resized_crop
from keras_nrs.data.augmentation import resized_center_crop

# Arrays and tf.data: the same on each backend.
pytestmark = pytest.mark.only_torch

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (3, 6, 5, 2), dtype="uint8")


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_moves_each_image_in_a_frame(mode: Literal["constant", "reflect"]) -> None:
    top, left = np.array([0, 4, 8]), np.array([3, 4, 5])
    positions = tf.constant(top), tf.constant(left)
    cropped = crop(tf.constant(IMAGES), *positions, mode.upper()).numpy()
    padded = np.pad(IMAGES, [(0, 0), (4, 4), (4, 4), (0, 0)], mode)
    for i in range(3):
        window = padded[i, top[i] : top[i] + 6, left[i] : left[i] + 5]
        np.testing.assert_array_equal(cropped[i], window)


def test_flip_mirrors_left_to_right() -> None:
    flipped = flip(tf.constant(IMAGES), tf.constant([True, False, True])).numpy()
    np.testing.assert_array_equal(flipped[0], IMAGES[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], IMAGES[1])


@pytest.mark.parametrize(
    ("y", "x", "rows", "columns"),
    [(16, 16, (8, 24), (8, 24)), (0, 31, (0, 8), (23, 32)), (20, 3, (12, 28), (0, 11))],
)
def test_cut_out_clears_a_square_that_the_border_cuts(
    y: int, x: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    images = RNG.normal(size=(1, 32, 32, 3)).astype("float32")
    expected = images.copy()
    expected[0, slice(*rows), slice(*columns)] = 0
    result = cut_out(tf.constant(images), tf.constant([y]), tf.constant([x]))
    np.testing.assert_array_equal(result, expected)


def test_mix_up_averages_neighbours() -> None:
    images = RNG.normal(size=(3, 2, 2, 1)).astype("float32")
    labels = np.eye(3, dtype="float32")
    mixed_images, mixed_labels = mix_up(images, labels, tf.constant(0.75))
    for i in range(3):
        np.testing.assert_allclose(
            mixed_images[i], 0.75 * images[i] + 0.25 * images[i - 1], rtol=1e-6
        )
        np.testing.assert_array_equal(
            mixed_labels[i], 0.75 * labels[i] + 0.25 * labels[i - 1]
        )


def draws(rows: range = range(4_000), seed: int = 0) -> Draws:
    return Draws(tf.constant([seed, 1]), 4_000, tf.range(rows.start, rows.stop))


def test_draws_are_uniform_and_those_of_the_rows() -> None:
    drawn, part = draws(), draws(range(10, 20))
    first, second = drawn.integers(9).numpy(), drawn.integers(9).numpy()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(part.integers(9), first[10:20])
    counts = np.bincount(first, minlength=9)
    # Chi-squared with 8 degrees of freedom is below 26.1 with probability 0.999.
    assert np.sum((counts - 4_000 / 9) ** 2 / (4_000 / 9)) < 26.1


def test_the_draw_of_a_batch_is_that_of_all_its_parts() -> None:
    drawn = [draws(seed=i).integer(9).numpy() for i in range(20)]
    part = [draws(range(10, 20), seed=i).integer(9).numpy() for i in range(20)]
    np.testing.assert_array_equal(part, drawn)
    assert np.shape(drawn) == (20, 1)
    assert len(np.unique(drawn)) > 4


def test_beta_of_1_is_uniform() -> None:
    drawn = np.array([draws(seed=i).beta(1.0) for i in range(400)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # Standard errors: 0.0144 of the mean, and 0.0037 of the variance, 1/12.
    assert drawn.mean() == pytest.approx(0.5, abs=0.06)
    assert drawn.var() == pytest.approx(1 / 12, abs=0.015)


def test_each_image_of_a_batch_is_augmented_on_its_own() -> None:
    same = tf.constant(np.broadcast_to(IMAGES[:1], (50, 6, 5, 2)))
    images, _ = AUGMENTATIONS["basic"](
        same, tf.eye(50), Draws(tf.constant([0, 0]), 50, tf.range(50)), lambda x: x
    )
    assert len({image.tobytes() for image in images.numpy()}) > 30


def test_resized_crops_keep_what_they_show() -> None:
    # A ramp from left to right: resized, it is a ramp with other ends.
    ramp = np.broadcast_to(np.linspace(0, 255, 200)[None, :, None], (100, 200, 3))
    image = tf.constant(np.round(ramp).astype("uint8"))
    center = resized_center_crop(image, 56).numpy()
    assert center.shape == (56, 56, 3)
    # The shorter side of 100 becomes 64: the center is 87.5 of 200 pixels wide.
    expected = 255 * (0.5 + (np.arange(56) - 27.5) / 64 * 100 / 200)
    np.testing.assert_allclose(center[28, :, 0], expected, atol=1.5)
    part = random_resized_crop(image, tf.constant([0, 3]), 56).numpy()
    assert part.shape == (56, 56, 3)
    assert np.all(np.diff(part[0, :, 0].astype(int)) >= 0)
    assert np.all(part[0] == part[-1])
