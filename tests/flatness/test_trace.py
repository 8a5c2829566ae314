"""The trace of the Hessian."""

import numpy as np
import pytest

from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import hessian_trace
from tests.support import hessians


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_the_standard_error_of_the_trace_is_honest(method: str) -> None:
    model = hessians.classifier()
    x, y = hessians.data(32)
    exact = np.trace(hessian_operator(model, x, y, variables="all").to_dense())
    traces = [
        hessian_trace(
            model, x, y, method=method, num_products=30, seed=seed, variables="all"
        )
        for seed in range(12)
    ]
    assert {t.num_products for t in traces} == {30}
    scores = [(t.value - exact) / t.standard_error for t in traces]
    # Student's t with at least 9 degrees of freedom: 1e-4 on either side, each.
    assert np.max(np.abs(scores)) < 6
    assert 0.3 < np.sqrt(np.mean(np.square(scores))) < 2.0
