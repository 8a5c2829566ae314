"""Sums of squares, from which norms are made."""

import numpy as np
import pytest
from keras import ops

from keras_nrs.backend import sum_of_squares
from tests.support.matrix import rest


# Of each way to compute it: PyTorch's own norm is off by 1e-4 for the last.
@pytest.mark.parametrize("size", [2**12, *rest(2**12 + 1, 2**17 + 1), 2**22])
def test_large_tensors_are_summed_exactly(size: int) -> None:
    x = np.random.default_rng(0).normal(size=size).astype("float32")
    found = sum_of_squares([ops.convert_to_tensor(x), ops.ones((3,))])
    expected = np.square(x.astype("float64")).sum() + 3
    assert float(ops.convert_to_numpy(found)) == pytest.approx(expected, rel=4e-7)
