"""Products in a file, with which a stopped measurement goes on."""

from pathlib import Path

import numpy as np
import pytest

from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import hessian_trace
from keras_nrs.flatness.product_log import ProductLog
from tests.support import hessians


@pytest.mark.matrix
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


@pytest.mark.only_torch
def test_products_of_a_diverged_model(tmp_path: Path) -> None:
    x, y = hessians.data(8)
    model = hessians.classifier()
    model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
    for _ in range(2):
        trace = hessian_trace(model, x, y, checkpoint=tmp_path / "products")
        assert np.isnan(trace.value)


@pytest.mark.only_torch
def test_a_flipped_bit_is_computed_again(tmp_path: Path) -> None:
    """Whichever bit of the records it is, no product changes."""
    size, path, rng = 5, tmp_path / "products", np.random.default_rng(0)
    matrix = rng.normal(size=(size, size))
    vectors = np.eye(size)[:4]

    def products() -> tuple[list[np.ndarray], int]:
        calls = []

        def compute(vector: np.ndarray) -> np.ndarray:
            calls.append(vector)
            return (matrix @ vector).astype("float32").astype(float)

        log = ProductLog(path, size, "float32")
        return [log.product(vector, compute) for vector in vectors], len(calls)

    expected, calls = products()
    assert calls == 4
    whole = path.read_bytes()
    header = len(ProductLog(path, size, "float32")._header)
    for place in range(header, len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        found, calls = products()
        np.testing.assert_array_equal(found, expected)
        # The first product, to see that it is the right file, and the damaged one.
        assert calls <= 2
        assert path.read_bytes() == whole
    for place in range(header):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"products'.*damaged.* Delete it"):
            products()
