"""Noise times a scale: of the released code, and of each weight's own size."""

import math

import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs.perturbations import NOISES
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import ElementwiseNoise
from keras_nrs.perturbations import ReleasedCode
from tests.support.arrays import ULP
from tests.support.perturbations import NORM_RTOL
from tests.support.perturbations import SIZE
from tests.support.perturbations import norm
from tests.support.perturbations import to_numpy
from tests.support.perturbations import weights_like
from tests.support.statistics import LEVEL


def test_released_delta_is_noise_over_the_norm_of_theta() -> None:
    weights = weights_like(((300, 200), (4,), (300, 200)))
    sphere, uniform = (
        to_numpy(ReleasedCode(radius=r).sample(weights, 0.1, 2))
        for r in ("sphere", "uniform")
    )
    noise = np.concatenate([a.ravel() for a in sphere]) * norm(weights) / 0.1
    assert scipy.stats.kstest(noise, "norm").pvalue > LEVEL
    # The same key gives the same noise, times one u in [0, 1) for all weights: a norm,
    # a division and two products are rounded, each of both.
    ratios = np.concatenate(
        [b[a != 0] / a[a != 0] for a, b in zip(sphere, uniform, strict=True)]
    )
    u = np.median(ratios)
    assert 0 <= u < 1
    np.testing.assert_allclose(ratios, u, rtol=16 * ULP)
    # norm(g)^2 is chi-squared: its root is sqrt(n) within 5 deviations of 1/sqrt(2).
    n = noise.size
    expected = 0.1 * math.sqrt(n) / norm(weights)
    assert norm(sphere) == pytest.approx(expected, rel=5 / math.sqrt(2 * n))


def test_released_rademacher_norm_is_exact() -> None:
    weights = weights_like()
    delta = ReleasedCode(radius="sphere", noise="rademacher").sample(weights, 0.1, 0)
    expected = 0.1 * math.sqrt(SIZE) / norm(weights)
    assert norm(delta) == pytest.approx(expected, rel=NORM_RTOL)


@pytest.mark.parametrize("noise", NOISES)
def test_elementwise_delta_is_a_share_of_each_weight(noise: str) -> None:
    """eps * theta * g, with the noise g that a ball draws from the same key."""
    weights = weights_like()
    deltas = to_numpy(ElementwiseNoise(noise=noise).sample(weights, 0.1, 4))
    ball = to_numpy(Ball(radius="sphere", noise=noise).sample(weights, 1.0, 4))
    shares = [d / w / 0.1 for d, w in zip(deltas, to_numpy(weights), strict=True)]
    ratios = np.concatenate(
        [(s / b).ravel() for s, b in zip(shares, ball, strict=True)]
    )
    # Both are g, times one number: the norm of g. A few products are rounded.
    np.testing.assert_allclose(ratios, np.median(ratios), rtol=NORM_RTOL)
    if noise == "rademacher":
        np.testing.assert_allclose(ratios, math.sqrt(SIZE), rtol=NORM_RTOL)


def test_elementwise_shares_are_normal() -> None:
    weights = weights_like(((100, 100), (30,)))
    deltas = to_numpy(ElementwiseNoise().sample(weights, 0.1, 2))
    shares = [d / w for d, w in zip(deltas, to_numpy(weights), strict=True)]
    noise = np.concatenate([share.ravel() for share in shares]) / 0.1
    assert scipy.stats.kstest(noise, "norm").pvalue > LEVEL


def test_elementwise_leaves_a_zero_weight_alone() -> None:
    (delta,) = to_numpy(ElementwiseNoise().sample([ops.array([0.0, -0.0, 2.0])], 1, 0))
    np.testing.assert_array_equal(delta == 0, [True, True, False])
