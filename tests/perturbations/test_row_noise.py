"""Noise that is drawn for the rows of a table that are read."""

import math

import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs import perturbations
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations.random_noise import random_stream
from keras_nrs.perturbations.row_noise import RowDelta
from keras_nrs.perturbations.row_noise import RowNoise
from tests.support.matrix import rest
from tests.support.statistics import LEVEL
from tests.support.statistics import key

pytestmark = pytest.mark.not_torch  # It cannot draw a row without those before.

SHAPE = 300, 7
ROWS = np.array([5, 0, 299, 5])


def table() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    values[0] = 0  # A row without a scale.
    return values


@pytest.mark.parametrize("noise", ["normal", *rest("rademacher")])
def test_rows_are_those_of_all_the_noise(noise: str) -> None:
    of_table = RowNoise(random_stream(key(0)), noise, SHAPE, "float32")
    whole = ops.convert_to_numpy(of_table.rows(None))
    assert whole.shape == SHAPE
    rows = ops.convert_to_numpy(of_table.rows(ops.convert_to_tensor(ROWS, "int32")))
    np.testing.assert_array_equal(rows, whole[ROWS])
    # There are 128 rows of signs.
    assert len(np.unique(whole, axis=0)) > 90


def test_each_table_has_noise_of_its_own() -> None:
    stream = random_stream(key(0))
    first, second = (RowNoise(stream, "normal", SHAPE, "float32") for _ in range(2))
    whole = [ops.convert_to_numpy(t.rows(None)).ravel() for t in (first, second)]
    drawn = ops.convert_to_numpy(stream.normal(SHAPE)).ravel()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        values = [*whole, drawn]
        # The deviation of a correlation of independent values is 1 / sqrt(2100).
        assert abs(np.corrcoef(values[a], values[b])[0, 1]) < 5 / math.sqrt(2100)


def test_sums_of_squares_have_the_distribution_of_sums() -> None:
    size = math.prod(SHAPE)
    sums = [
        ops.convert_to_numpy(
            RowNoise(random_stream(key(i)), "normal", SHAPE, "float32").sum_of_squares()
        )
        for i in range(300)
    ]
    assert scipy.stats.kstest(sums, scipy.stats.chi2(size).cdf).pvalue > LEVEL
    signs = RowNoise(random_stream(key(0)), "rademacher", SHAPE, "float32")
    assert ops.convert_to_numpy(signs.sum_of_squares()) == size


@pytest.mark.parametrize("name", ["filterwise", *rest("relative", "elementwise")])
def test_rows_of_delta_are_those_of_all_of_delta(name: str) -> None:
    perturbation = perturbations.get_perturbation(name)
    theta = table()
    units = {"units": [(0,), ()]} if name == "filterwise" else {}
    delta, of_bias = perturbation.sample(
        [theta, np.ones(3, "float32")], 0.5, key(1), tables=[True, False], **units
    )
    assert isinstance(delta, RowDelta) and tuple(of_bias.shape) == (3,)
    whole = ops.convert_to_numpy(delta.of(ops.convert_to_tensor(theta), None))
    rows = delta.of(ops.convert_to_tensor(theta[ROWS]), ops.convert_to_tensor(ROWS))
    np.testing.assert_allclose(ops.convert_to_numpy(rows), whole[ROWS], rtol=1e-6)
    if name == "filterwise":
        norms = np.linalg.norm(theta, axis=1)
        np.testing.assert_allclose(
            np.linalg.norm(whole, axis=1), 0.5 * norms, rtol=1e-5
        )
    if name == "elementwise":
        assert not whole[0].any()


@pytest.mark.parametrize("name", ["relative", *rest("layerwise", "ball", "released")])
def test_delta_of_a_table_is_as_long_as_of_a_kernel(name: str) -> None:
    """Up to the norm of the noise, whose deviation is 1 / sqrt(2 * n) of it."""
    cls = perturbations.NAMES[name]
    theta = table()
    lengths = []
    for tables in ([True], None):
        (delta,) = cls(radius="sphere").sample([theta], 0.5, key(2), tables=tables)
        if tables:
            delta = delta.of(ops.convert_to_tensor(theta), None)
        lengths.append(np.linalg.norm(ops.convert_to_numpy(delta)))
    assert lengths[0] == pytest.approx(
        lengths[1], rel=5 * 2 / math.sqrt(2 * theta.size)
    )


def test_a_table_whose_rows_are_no_units_is_drawn_whole() -> None:
    (delta,) = FilterwiseBall().sample(
        [table()], 0.5, key(0), tables=[True], units=[(1,)]
    )
    assert tuple(delta.shape) == SHAPE and not isinstance(delta, RowDelta)
