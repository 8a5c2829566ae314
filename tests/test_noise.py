"""The noise that is made from hashed indices, as JAX and TensorFlow use it."""

import math
from typing import Any

import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs import noise
from keras_nrs.backend import compile_function
from tests.support.precision import jax_float64

# PyTorch has no 32-bit unsigned arithmetic, and a generator of its own.
pytestmark = pytest.mark.not_torch

LEVEL = 1e-4
SIZE = 2**20


def words(seed: int, shape: tuple[int, ...] = (SIZE,)) -> np.ndarray:
    """Words of the key `(seed, seed)`."""
    key = ops.convert_to_tensor(np.full(2, seed, "uint32"))
    draw = compile_function(lambda key: noise.words(key, shape))
    return np.array(ops.convert_to_numpy(draw(key)))


def hashed(word: int) -> int:
    """MurmurHash3's finalizer, in Python."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * factor % 2**32
    return word ^ (word >> 16)


def test_words_are_the_hash_of_key_and_index() -> None:
    expected = [hashed(hashed((5 + i) % 2**32) ^ 5) for i in range(6)]
    np.testing.assert_array_equal(words(5, (6,)), expected)
    np.testing.assert_array_equal(words(5, (2, 3)).ravel(), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_words_are_uniform_and_their_bytes_independent(seed: int) -> None:
    drawn = words(seed)
    parts = [(drawn >> shift & 0xFF).astype("int64") for shift in (0, 8, 16, 24)]
    pairs = [256 * a + b for i, a in enumerate(parts) for b in parts[i + 1 :]]
    pairs += [256 * part[1:] + part[:-1] for part in parts]
    for pair in pairs:
        counts = np.bincount(pair, minlength=2**16)
        assert scipy.stats.chisquare(counts).pvalue > LEVEL


def test_keys_that_differ_in_a_bit_give_unrelated_words() -> None:
    streams = [words(1 << bit) for bit in range(0, 32, 4)] + [words(0)]
    signs = [1.0 - 2.0 * (stream >> 31) for stream in streams]
    correlations = np.corrcoef(signs)[np.triu_indices(len(signs), k=1)]
    largest = np.max(np.abs(correlations)) * math.sqrt(SIZE)
    assert correlations.size * 2 * scipy.stats.norm.sf(largest) > LEVEL


def sums() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values of the sum that noise is made of, their probabilities, and words."""
    byte = np.arange(256)
    probabilities = np.bincount(2 * byte + byte % 2, minlength=512) / 256
    for _ in range(3):
        probabilities = np.convolve(probabilities, np.arange(511) % 2 == 0) / 256
    (values,) = np.nonzero(probabilities)
    # A first byte with the bit of the sum, which is 2 or 3 where it can be, and others.
    first = np.clip(values // 2 - 765, values % 2, None)
    first += (first - values) % 2
    others = [np.clip(values // 2 - first - 255 * i, 0, 255) for i in range(3)]
    words = sum(part << 8 * i for i, part in enumerate([first, *others]))
    return values, probabilities[values], words.astype("uint32")


def test_the_polynomial_is_the_fit_that_it_is_said_to_be() -> None:
    values, p, _ = sums()
    x = (values - 1020.5) / math.sqrt(np.sum(p * (values - 1020.5) ** 2))
    quantiles = scipy.stats.norm.ppf(np.cumsum(p) - p / 2)
    # By symmetry, because the upper half of the sums loses digits next to 1.
    quantiles[1020:] = -quantiles[1019::-1]
    powers = x[:, None] ** np.array([1, 3, 5, 7])
    weights = np.sqrt(p)
    fit, *_ = np.linalg.lstsq(powers * weights[:, None], quantiles * weights)
    fit /= math.sqrt(np.sum(p * (powers @ fit) ** 2))
    np.testing.assert_allclose(noise._QUANTILES, fit, atol=5e-9)


def test_all_values_of_the_normal_noise() -> None:
    """Exactly, by their probabilities: no sampling error."""
    values, p, some = sums()
    given = ops.convert_to_tensor(some)
    drawn = ops.convert_to_numpy(noise.normal(given, "float32")).astype("float64")
    assert len(values) == 2040
    assert np.all(np.diff(drawn) > 0)
    # A delta of one element points somewhere.
    assert np.min(np.abs(drawn)) > 0.001
    np.testing.assert_allclose(drawn, -drawn[::-1], atol=1e-6)
    variance, kurtosis = (np.sum(p * drawn**n) for n in (2, 4))
    assert variance == pytest.approx(1, abs=1e-6)
    assert kurtosis == pytest.approx(2.9995, abs=1e-4)
    distance = np.abs(scipy.stats.norm.cdf(drawn) - np.cumsum(p))
    assert np.max(distance) < 0.0012
    assert np.max(drawn) == pytest.approx(4.86, abs=0.005)


def test_a_million_normal_numbers() -> None:
    """KS against the discrete distribution of the test above, which has steps."""
    drawn = noise.normal(ops.convert_to_tensor(words(7)), "float32")
    numbers = np.asarray(ops.convert_to_numpy(drawn), dtype="float64")
    result = scipy.stats.kstest(numbers, "norm")
    # Their true distribution function is within 0.0012 of the normal one.
    excess = max(0.0, result.statistic - 0.0012)
    assert scipy.stats.kstwo.sf(excess, SIZE) > LEVEL


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["normal", "rademacher"])
def test_dtypes(name: str, dtype: str) -> None:
    if keras.config.backend() == "jax" and dtype == "float64":
        with jax_float64():
            drawn: Any = getattr(noise, name)(ops.arange(4, dtype="uint32"), dtype)
    else:
        given = ops.cast(ops.arange(4), "uint32")
        drawn = getattr(noise, name)(given, dtype)
    assert keras.backend.standardize_dtype(drawn.dtype) == dtype
