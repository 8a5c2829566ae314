"""Products in a file, with which a stopped measurement goes on."""

from pathlib import Path

import numpy as np
import pytest

from keras_nrs.flatness import hessian_operator
from tests.support import hessians


def test_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not a power of 2, so that means are rounded.
    x, y = hessians.data(30)
    model = hessians.classifier()
    path = tmp_path / "new" / "products"
    expected = hessian_operator(model, x, y).to_dense()
    first = hessian_operator(model, x, y, checkpoint=path)
    for column in np.eye(27)[:10]:
        first @ column
    again = hessian_operator(model, x, y, checkpoint=path)
    np.testing.assert_array_equal(again.to_dense(), expected)
    # All but the ten in the file, and one of these, to see that it is the right file.
    assert again.num_products == 27 - 10 + 1
    # A record that was cut off is computed again.
    path.write_bytes(path.read_bytes()[:-5])
    cut = hessian_operator(model, x, y, checkpoint=path)
    np.testing.assert_array_equal(cut.to_dense(), expected)
    assert cut.num_products == 2
    with pytest.raises(ValueError, match="`checkpoint` must be of the same model"):
        hessian_operator(model, x + 1, y, checkpoint=path).to_dense()
    with pytest.raises(ValueError, match="`checkpoint` must be a new file"):
        hessian_operator(model, x, y, variables="all", checkpoint=path)
    path.write_text("something else")
    with pytest.raises(ValueError, match="`checkpoint` must be a new file"):
        hessian_operator(model, x, y, checkpoint=path)
