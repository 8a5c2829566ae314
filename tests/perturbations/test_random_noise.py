"""How delta is drawn: its length, its direction, its dtype, from names and configs.

Every p-value must exceed 1e-4. There are about 40 for each backend, each with a fixed
seed: a correct program had a chance below 0.5 % to need another seed.
"""

import functools
import math
from typing import Any

import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs import perturbations
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import Perturbation
from keras_nrs.perturbations import RelativeBall
from tests.support.matrix import rest
from tests.support.perturbations import NORM_RTOL
from tests.support.perturbations import RANDOM
from tests.support.perturbations import SHAPES
from tests.support.perturbations import SIZE
from tests.support.perturbations import WITH_RADIUS
from tests.support.perturbations import norm
from tests.support.perturbations import to_numpy
from tests.support.perturbations import weights_like
from tests.support.precision import precision
from tests.support.statistics import LEVEL
from tests.support.statistics import key
from tests.support.statistics import max_correlation_p_value
from tests.support.statistics import off_diagonal

BACKEND = keras.config.backend()
# PyTorch draws each by itself, with its own generator of normal numbers.
NUM_SAMPLES = 2_000 if BACKEND == "torch" else 10_000
# One stream draws for all of them.
FEW = [perturbations.FilterwiseBall]
FEW += rest(*(cls for cls in RANDOM if cls not in FEW))


@functools.cache
def ball_samples(noise: str) -> dict[str, np.ndarray]:
    """Flat samples of the ball of radius 2 for each distribution of lengths.

    At the first steps of one seed.
    """
    weights = [ops.zeros(shape) for shape in SHAPES]

    def draw(key: Any) -> list[Any]:
        return [
            ops.concatenate(
                [
                    ops.reshape(delta, (-1,))
                    for delta in Ball(radius=radius, noise=noise).sample(
                        weights, 2.0, key
                    )
                ]
            )
            for radius in perturbations.RADII
        ]

    steps = np.stack([np.full(NUM_SAMPLES, 7), np.arange(NUM_SAMPLES)], axis=-1)
    keys = ops.convert_to_tensor(steps, key(7).dtype)
    if BACKEND == "torch":
        samples = [ops.stack(s) for s in zip(*map(draw, keys), strict=True)]
    else:
        samples = compile_function(lambda keys: ops.map(draw, keys))(keys)
    return dict(zip(perturbations.RADII, to_numpy(samples), strict=True))


# The ball.


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("radius", perturbations.RADII)
def test_thousands_of_samples_stay_in_the_ball(radius: str, noise: str) -> None:
    samples = ball_samples(noise)[radius]
    assert samples.shape == (NUM_SAMPLES, SIZE)
    assert np.all(np.isfinite(samples))
    assert np.max(np.linalg.norm(samples, axis=1)) <= 2.0


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("radius", perturbations.RADII)
def test_radius_follows_its_distribution(radius: str, noise: str) -> None:
    lengths = np.linalg.norm(ball_samples(noise)[radius], axis=1) / 2.0
    if radius == "sphere":
        np.testing.assert_allclose(lengths, 1.0, rtol=NORM_RTOL)
        return
    # A point uniform in a ball of R^n has a length of U^(1/n).
    uniform = lengths**SIZE if radius == "volume" else lengths
    assert scipy.stats.kstest(uniform, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("radius", perturbations.RADII)
def test_normal_direction_is_uniform_on_the_sphere(radius: str) -> None:
    samples = ball_samples("normal")[radius]
    lengths = np.linalg.norm(samples, axis=1)
    axis = np.random.default_rng(0).normal(size=SIZE)
    axis /= np.linalg.norm(axis)
    cosines = samples @ axis / lengths
    beta = scipy.stats.beta(0.5, (SIZE - 1) / 2)
    assert scipy.stats.kstest(cosines**2, beta.cdf).pvalue > LEVEL
    assert scipy.stats.binomtest(int(np.sum(cosines > 0)), NUM_SAMPLES).pvalue > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_length_and_direction_are_independent(noise: str) -> None:
    samples = ball_samples(noise)["uniform"]
    lengths = np.linalg.norm(samples, axis=1)
    directions = samples / lengths[:, None]
    rho = np.array([np.corrcoef(lengths, d)[0, 1] for d in directions.T])
    assert max_correlation_p_value(rho, NUM_SAMPLES) > LEVEL


def test_rademacher_components_are_equal_and_fair() -> None:
    samples = ball_samples("rademacher")["sphere"]
    np.testing.assert_allclose(
        np.abs(samples), 2.0 / math.sqrt(SIZE), rtol=NORM_RTOL, atol=0
    )
    num_positive = int(np.sum(samples > 0))
    assert scipy.stats.binomtest(num_positive, samples.size).pvalue > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_elements_and_successive_samples_are_uncorrelated(noise: str) -> None:
    samples = ball_samples(noise)["sphere"]
    # Includes all pairs of elements of the two leaves of equal shape.
    correlations = off_diagonal(np.corrcoef(samples.T))
    assert max_correlation_p_value(correlations, NUM_SAMPLES) > LEVEL
    successive = np.array([np.corrcoef(s[1:], s[:-1])[0, 1] for s in samples.T])
    assert max_correlation_p_value(successive, NUM_SAMPLES - 1) > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("cls", FEW)
def test_leaves_steps_and_seeds_are_uncorrelated(cls: Any, noise: str) -> None:
    size = 10_000
    weights = [ops.ones((100, 100)), ops.ones((100, 100))]
    arguments = {"radius": "sphere"} if cls in WITH_RADIUS else {}
    perturbation = cls(noise=noise, **arguments)
    sample = compile_function(lambda k: perturbation.sample(weights, 1.0, k))
    leaves = [
        leaf.ravel()
        for seed in (0, 1)
        for step in range(8)
        for leaf in to_numpy(sample(key(seed, step)))
    ]
    correlations = off_diagonal(np.corrcoef(leaves))
    assert max_correlation_p_value(correlations, size) > LEVEL


@pytest.mark.parametrize("cls", FEW)
def test_the_same_key_gives_the_same_sample(cls: type[Perturbation]) -> None:
    weights, perturbation = weights_like(), cls()
    seeds = keras.random.SeedGenerator(3)
    samples = [
        np.concatenate([t.ravel() for t in to_numpy(perturbation.sample(*args))])
        for args in (
            (weights, 1.0, 3),
            (weights, 1.0, 3),
            (weights, 1.0, key(3)),
            (weights, 1.0, RandomStream(key(3))),
            (weights, 1.0, seeds),
            (weights, 1.0, seeds),
            (weights, 1.0, 4),
        )
    ]
    for again in samples[1:5]:
        np.testing.assert_array_equal(again, samples[0])
    assert not np.any(samples[5] == samples[0])
    assert not np.any(samples[6] == samples[0])


@pytest.mark.parametrize("cls", FEW)
def test_no_perturbation_at_eps_zero(cls: type[Perturbation]) -> None:
    for delta in to_numpy(cls().sample(weights_like(), 0.0, 0)):
        np.testing.assert_array_equal(delta, 0.0)


@pytest.mark.parametrize("cls", FEW)
def test_eps_scales_the_sample(cls: type[Perturbation]) -> None:
    """eps may be a tensor or a variable; doubling it doubles delta exactly."""
    weights = weights_like()
    once = to_numpy(cls().sample(weights, 0.25, 0))
    for eps in (0.5, ops.convert_to_tensor(0.5), keras.Variable(0.5)):
        twice = to_numpy(cls().sample(weights, eps, 0))
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_array_equal(2 * a, b)


# Dtypes.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cls", FEW)
def test_half_precision_weights(cls: type[Perturbation], dtype: str) -> None:
    weights = weights_like(dtype=dtype)
    deltas = cls().sample(weights, 0.1, 0)
    for weight, delta, new in zip(
        weights, deltas, perturbations.add_deltas(weights, deltas), strict=True
    ):
        assert keras.backend.standardize_dtype(delta.dtype) == "float32"
        assert keras.backend.standardize_dtype(new.dtype) == dtype
        expected = ops.cast(ops.cast(weight, "float32") + delta, dtype)
        np.testing.assert_array_equal(*to_numpy([new, expected]))


def test_float16_norms_do_not_overflow() -> None:
    """norm^2 = 4e6 is beyond float16, which ends at 65504."""
    weights = [ops.full((1000,), 64.0, dtype="float16")]
    delta = RelativeBall(radius="sphere").sample(weights, 0.5, 0)
    # Pairwise or blocked sums of 1,000 squares; the margin dominates.
    assert norm(delta) == pytest.approx(0.5 * 64 * math.sqrt(1000), rel=4e-6)


def test_norm_of_many_elements() -> None:
    """Summed one by one in float32, these squares are off by 3e-3."""
    values = np.random.default_rng(0).normal(size=(3, 1_000_001)).astype("float32")
    found = perturbations.norm([ops.convert_to_tensor(values)])
    expected = np.linalg.norm(values.astype("float64"))
    # Half of the margin that keeps delta inside of its ball.
    assert float(found) == pytest.approx(expected, rel=2.0**-21)


@pytest.mark.parametrize("cls", FEW)
def test_float64_weights(cls: Any) -> None:
    with precision("float64"):
        weights = weights_like(dtype="float64")
        arguments = {"radius": "sphere"} if cls in WITH_RADIUS else {}
        deltas = cls(**arguments).sample(weights, 0.3, 0)
        for delta in deltas:
            assert keras.backend.standardize_dtype(delta.dtype) == "float64"
        if cls is RelativeBall:
            # 2^-53 for each of about SIZE roundings, and the margin, exactly.
            expected = 0.3 * norm(weights) * (1 - 2.0**-20)
            assert norm(deltas) == pytest.approx(expected, rel=1e-14)


# Names and configuration.


@pytest.mark.matrix
@pytest.mark.parametrize("cls", RANDOM)
def test_get_by_name(cls: type[Perturbation]) -> None:
    (name,) = (n for n, of_name in perturbations.NAMES.items() if of_name is cls)
    assert type(perturbations.get_perturbation(name)) is cls
    perturbation = cls()
    assert perturbations.get_perturbation(perturbation) is perturbation


@pytest.mark.matrix
@pytest.mark.parametrize("identifier", ["bal", None, 3, Ball])
def test_unknown_name(identifier: Any) -> None:
    with pytest.raises(ValueError, match=r"'ball', 'relative'.*Received: perturb"):
        perturbations.get_perturbation(identifier)


@pytest.mark.matrix
@pytest.mark.parametrize("cls", RANDOM)
def test_unknown_radius_and_noise(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"`noise`.*'rademacher'.*noise='uniform'"):
        cls(noise="uniform")
    if cls in WITH_RADIUS:
        with pytest.raises(ValueError, match=r"`radius`.*'volume'.*radius='ball'"):
            cls(radius="ball")


@keras.saving.register_keras_serializable(package="test_perturbations")
def registered_where(variable: Any) -> bool:
    return "kernel" in variable.name


@pytest.mark.matrix
@pytest.mark.parametrize("where", [None, "kernels", registered_where])
@pytest.mark.parametrize("cls", RANDOM)
def test_serialization_round_trip(cls: Any, where: Any) -> None:
    arguments = {"radius": "volume"} if cls in WITH_RADIUS else {}
    perturbation = cls(noise="rademacher", where=where, **arguments)
    config = keras.saving.serialize_keras_object(perturbation)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is cls
    assert copy.where is where
    assert copy.get_config() == perturbation.get_config()
    samples = [p.sample(weights_like(), 0.1, 0) for p in (perturbation, copy)]
    for a, b in zip(*map(to_numpy, samples), strict=True):
        np.testing.assert_array_equal(a, b)
