"""Inputs that are made worse."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from studies.corruptions import blurred
from studies.corruptions import corrupted
from studies.corruptions import noisy
from studies.corruptions import pale
from studies.corruptions import shifted

# Arrays alone: the same on each backend.
pytestmark = pytest.mark.only_torch


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    """Pixels from -1 to 3, not from 0 to 1."""
    pixels = rng.uniform(-1, 3, size=(40, 12, 12, 1))
    pixels.flat[:2] = -1, 3
    return pixels.astype("float32")


def test_noise_is_a_share_of_the_range(
    images: np.ndarray, rng: np.random.Generator
) -> None:
    x = noisy(images, 0.05, rng)
    assert (x.min(), x.max()) == (-1, 3)
    inner = (images > 0) & (images < 2)
    np.testing.assert_allclose((x - images)[inner].std(), 0.05 * 4, rtol=0.1)
    sequences = rng.normal(0, 3, size=(50, 40, 1)).astype("float32")
    found = (noisy(sequences, 0.5, rng) - sequences).std()
    np.testing.assert_allclose(found, 0.5 * 3, rtol=0.1)


def test_blur_mixes_the_pixels_of_one_image(
    images: np.ndarray, rng: np.random.Generator
) -> None:
    found = blurred(images, 1.5, rng)
    np.testing.assert_allclose(
        found[7, ..., 0], gaussian_filter(images[7, ..., 0], 1.5), rtol=1e-5, atol=1e-5
    )


def test_contrast_is_to_the_mean_of_each_image(
    images: np.ndarray, rng: np.random.Generator
) -> None:
    found = pale(images, 0.3, rng)
    np.testing.assert_allclose(found[3].mean(), images[3].mean(), rtol=1e-4)
    np.testing.assert_allclose(found[3].std(), 0.3 * images[3].std(), rtol=1e-4)


def test_shifted_images_are_dark_at_the_edge(
    images: np.ndarray, rng: np.random.Generator
) -> None:
    ways = set()
    for image, found in zip(images, shifted(images, 2, rng), strict=True):
        for rows in (2, -2):
            for columns in (2, -2):
                expected = np.full_like(image, -1)
                into = np.s_[max(rows, 0) : 12 + min(rows, 0)]
                out_of = np.s_[max(-rows, 0) : 12 + min(-rows, 0)]
                into_2 = np.s_[max(columns, 0) : 12 + min(columns, 0)]
                out_of_2 = np.s_[max(-columns, 0) : 12 + min(-columns, 0)]
                expected[into, into_2] = image[out_of, out_of_2]
                if np.array_equal(found, expected):
                    ways.add((rows, columns))
                    break
            else:
                continue
            break
        else:
            raise AssertionError("An image is not shifted by two pixels.")
    assert len(ways) == 4


def test_shifted_sequences_are_rotated(rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 40, 1)).astype("float32")
    for row, found in zip(x, shifted(x, 3, rng), strict=True):
        assert any(np.array_equal(found, np.roll(row, s, axis=0)) for s in (3, -3))


def test_all_kinds_have_five_strengths_that_grow(images: np.ndarray) -> None:
    found = corrupted(images, seed=1)
    assert list(found) == ["noise", "blur", "contrast", "shift"]
    for kind, inputs in found.items():
        sizes = [float(np.square(x - images).sum()) for x in inputs]
        assert len(sizes) == 5
        assert kind == "shift" or sizes == sorted(sizes)
        assert {x.dtype for x in inputs} == {np.dtype("float32")}
    again = corrupted(images, seed=1)
    np.testing.assert_array_equal(again["shift"][4], found["shift"][4])
    sequences = images[:, 0]
    assert list(corrupted(sequences)) == ["noise", "shift"]
