"""What is printed while a measurement runs."""

import pytest

from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import hessian_trace
from tests.support import hessians


@pytest.mark.matrix
def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = hessians.data(16)
    model = hessians.classifier()
    hessian_trace(model, x, y, num_products=9, verbose=1)
    out = capsys.readouterr().out
    # One line: nobody watches.
    assert out.count("9/9") == out.count("/9") == 1
    hessian_eigenvalues(model, x, y, verbose=1)
    assert "product" in capsys.readouterr().out
    hessian_density(model, x, y, num_samples=1, num_steps=3)
    assert capsys.readouterr().out == ""
