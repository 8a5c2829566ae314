"""Data that differ between passes are an error; another order is not."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.batches import Batches
from keras_nrs.batches import check_not_empty
from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import hessian_trace
from keras_nrs.flatness import loss_landscape
from tests.support import hessians
from tests.support.matrix import rest


class Changing(keras.utils.PyDataset):
    """Four batches of 8 of 40 samples, in a new order at each pass.

    As after `shuffle()`: of all 40 with `whole`, otherwise of the first 32 of these.
    """

    def __init__(self, *, whole: bool = False, noise: float = 0.0) -> None:
        super().__init__()
        self.passes = 0
        self.whole = whole
        self.noise = noise

    def __len__(self) -> int:
        return 5 if self.whole else 4

    def __getitem__(self, index: int) -> Any:
        x, y = hessians.data(40)
        rng = np.random.default_rng(self.passes)
        order = rng.permutation(40)
        x = x + self.noise * rng.normal(size=x.shape)
        chosen = order[8 * index : 8 * index + 8]
        return x[chosen].astype("float32"), y[chosen]

    def on_epoch_end(self) -> None:
        self.passes += 1


@pytest.mark.parametrize(
    "options", [{}, *rest({"whole": True, "noise": 0.1}, {"noise": 0.1})]
)
@pytest.mark.parametrize(
    "measure",
    [
        hessian_eigenvalues,
        *rest(
            hessian_trace,
            hessian_density,
            lambda *data, variables: loss_landscape(*data, num_points=3),
            # All of this matrix is found in one pass, and checked in another.
            lambda *data, variables: hessian_eigenvalues(*data, variables=_is_small),
        ),
    ],
)
def test_data_that_change_between_passes(measure: Any, options: dict[str, Any]) -> None:
    model = hessians.classifier()
    with pytest.raises(ValueError, match="`x` must yield the same samples at each"):
        measure(model, Changing(**options), variables="all")


def _is_small(variable: Any) -> bool:
    return len(variable.shape) == 1 and variable.shape[0] < 12


@pytest.mark.parametrize("x", [None, [], {}, np.ones((0, 2)), [np.ones((0, 2)), None]])
def test_no_samples(x: Any) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        check_not_empty(x)


@pytest.mark.parametrize("x", [[None], [np.ones((3, 2)), None], {"a": None}, iter([])])
def test_samples_that_may_be(x: Any) -> None:
    """Keras knows which inputs are optional, and how many samples an iterator has."""
    check_not_empty(x)


@pytest.mark.only_torch
def test_an_input_may_be_none_if_it_is_optional() -> None:
    x = {"a": None, "b": np.ones((5, 2))}
    first, second = Batches(None, x, np.ones(5), batch_size=3)
    assert (first.num_samples, second.num_samples) == (3, 2)
    assert first.x["a"] is None


@pytest.mark.matrix
def test_another_order_and_steps_are_no_change() -> None:
    model = hessians.classifier()
    expected = hessian_eigenvalues(model, *hessians.data(40)).eigenvalues
    result = hessian_eigenvalues(model, Changing(whole=True)).eigenvalues
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    kept = hessian_eigenvalues(model, Changing(), steps=4)
    assert kept.converged
    # Samples of another pass than the arrays'.
    first, second = (hessian_operator(model, Changing(), steps=4) for _ in range(2))
    np.testing.assert_array_equal(first.to_dense(), second.to_dense())


@pytest.mark.only_torch
def test_data_that_a_digest_must_take() -> None:
    """Strings, labels that move to other inputs, and parts of different length."""

    class Yields(keras.utils.PyDataset):
        def __init__(self, *passes: Any) -> None:
            super().__init__()
            self.left = [*passes, *passes[-1:]]

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            x, y = self.left[0]
            return x[index::2], y[index::2]

        def on_epoch_end(self) -> None:
            self.left = self.left[1:]

    def read(*passes: Any) -> None:
        batches = Batches(None, Yields(*passes))
        for _ in passes:
            list(batches._read_checked())

    numbers, labels = np.eye(4, dtype="float32"), np.arange(4)
    words = np.array([b"a", "ü".encode(), b"c", b"d"], dtype=object)
    read((numbers, labels), (numbers[::-1], labels[::-1]))
    read((words, labels), (words[::-1], labels[::-1]))
    read((numbers, labels[:2]), (numbers, labels[:2]))
    # Many, because sums of weak hashes agree by chance.
    for x in (numbers, words):
        for shift in range(200):
            first, second = labels + shift, labels[::-1] + shift
            with pytest.raises(ValueError, match="`x` must yield the same samples"):
                read((x, first), (x, second))
