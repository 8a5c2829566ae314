"""Noise for tables of embeddings, drawn where their rows are read."""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras import ops

from keras_nrs.backend import RandomStream

Tensor = Any


class RowDelta(NamedTuple):
    """delta of a table, computed for the rows that are read.

    Attributes:
        shape: The shape of the table.
        of: Gives delta in some rows: of the values of these rows at theta, and their
            indices, of shape `(k,)`, or `None` for all.
    """

    shape: tuple[int, ...]
    of: Callable[[Tensor, Tensor | None], Tensor]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "RowDelta":
        """A function of delta."""
        return RowDelta(
            self.shape, lambda theta, indices: function(self.of(theta, indices))
        )


class RowNoise:
    """Random noise of a table's shape, each time the same.

    Args:
        rng: The stream that draws it.
        noise: Distribution of its elements, one of `NOISES`.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(
        self, rng: RandomStream, noise: str, shape: tuple[int, ...], dtype: str
    ) -> None:
        self._rng = rng.split()
        self._noise = noise
        self.dtype = dtype
        self.shape = shape

    def rows(self, indices: Tensor | None) -> Tensor:
        """The rows at these indices, of shape `(k,)`, or all."""
        rng = self._rng.fold_in(0)
        draw = rng.normal if self._noise == "normal" else rng.rademacher
        return draw(self.shape, self.dtype, rows=indices)

    def sum_of_squares(self) -> Tensor:
        """The sum of the squares of all elements.

        It is drawn rather than summed, since the rows that nobody reads do not exist.
        `sqrt(2 * sum)` is nearly normal, with mean `sqrt(2 * n - 1)` and variance 1
        (Fisher).
        """
        size = math.prod(self.shape)
        if self._noise == "rademacher":
            return ops.convert_to_tensor(float(size), self.dtype)
        deviate = self._rng.fold_in(1).normal((1,), self.dtype)
        return ops.square(ops.sum(deviate) + math.sqrt(2 * size - 1)) / 2


def delta_of(
    function: Callable[[Tensor, Tensor], Tensor], weight: Tensor, noise: Any
) -> Any:
    """delta: a function of a weight and of its noise, or of some rows of both."""
    if not isinstance(noise, RowNoise):
        return function(weight, noise)

    def of(theta: Tensor, indices: Tensor | None) -> Tensor:
        delta = function(ops.stop_gradient(theta), noise.rows(indices))
        return ops.stop_gradient(delta)

    return RowDelta(noise.shape, of)
