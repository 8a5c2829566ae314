"""The random numbers of the backend."""

from typing import Any

import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs.backend import RandomStream
from tests.support.asserts import numpy_values
from tests.support.statistics import LEVEL
from tests.support.statistics import key
from tests.support.statistics import max_correlation_p_value
from tests.support.statistics import off_diagonal


@pytest.mark.parametrize("method", ["normal", "uniform"])
def test_stream_follows_its_distribution(method: str) -> None:
    values = ops.convert_to_numpy(getattr(RandomStream(key(0)), method)((100_000,)))
    assert values.dtype == np.float32
    distribution = {"normal": "norm", "uniform": "uniform"}[method]
    assert scipy.stats.kstest(values.astype("float64"), distribution).pvalue > LEVEL
    if method == "uniform":
        assert np.min(values) >= 0 and np.max(values) < 1


def test_no_normal_number_is_zero() -> None:
    """A delta of one element would be zero too."""
    assert np.all(ops.convert_to_numpy(RandomStream(key(0)).normal((100_000,))))


@pytest.mark.only_tensorflow  # Where programs that are not compiled are common.
@pytest.mark.parametrize("method", ["normal", "rademacher", "uniform"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiling_changes_no_number(method: str, dtype: str) -> None:
    import tensorflow as tf

    def draw(key: Any) -> Any:
        return getattr(RandomStream(key).fold_in(3), method)((1001,), dtype)

    drawn = [
        tf.function(draw, jit_compile=compiled)(key(0)) for compiled in (False, True)
    ]
    np.testing.assert_array_equal(*numpy_values(drawn))


def test_stream_of_signs_is_fair() -> None:
    signs = ops.convert_to_numpy(RandomStream(key(0)).rademacher((100_000,)))
    assert signs.dtype == np.float32
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert scipy.stats.binomtest(int(np.sum(signs > 0)), signs.size).pvalue > LEVEL


def test_successive_draws_of_a_stream_differ() -> None:
    stream = RandomStream(key(0))
    draws = numpy_values([stream.normal((10_000,)) for _ in range(4)])
    draws += numpy_values([stream.rademacher((10_000,)) for _ in range(2)])
    correlations = off_diagonal(np.corrcoef(draws))
    assert max_correlation_p_value(correlations, 10_000) > LEVEL


# Only there is a stream a generator that is made anew from a seed of 32 bits.
@pytest.mark.only_torch
def test_torch_steps_never_share_a_generator_seed() -> None:
    seeds = {
        RandomStream(key)._generator.initial_seed()
        for key in ops.convert_to_tensor(
            np.stack([np.full(20_000, 42), np.arange(20_000)], axis=-1), dtype="int64"
        )
    }
    assert len(seeds) == 20_000


def test_deltas_of_replicas_and_steps_are_uncorrelated() -> None:
    seeds = keras.random.SeedGenerator(0)
    keys = [seeds.next() for _ in range(3)]
    num = 20_000
    noise = np.stack(
        [
            ops.convert_to_numpy(RandomStream(key).fold_in(i).normal((num,)))
            for key in keys
            for i in range(4)
        ]
    )
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    # 66 pairs of a standard deviation of num ** -0.5: 5 of it have odds of 4e-5.
    assert np.abs(correlation).max() < 5 / np.sqrt(num)
