"""Drawing of random noise and of random points in balls."""

import itertools
import math
import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import keras
from keras import ops

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_scalar
from keras_nrs._checks import check_seed
from keras_nrs.backend import RandomStream
from keras_nrs.backend import reshape
from keras_nrs.backend import sum_of_squares
from keras_nrs.perturbations.perturbation import Perturbation
from keras_nrs.perturbations.perturbation import Where
from keras_nrs.perturbations.row_noise import RowDelta
from keras_nrs.perturbations.row_noise import RowNoise
from keras_nrs.perturbations.row_noise import delta_of

Tensor = Any

RADII = ("volume", "uniform", "sphere")
NOISES = ("normal", "rademacher")

# Keeps delta inside the ball despite float32 rounding, for up to about 1e9 elements.
ROUNDING_MARGIN = 1 - 2.0**-20

# Indices have 31 bits: more elements than this need one draw for each weight.
_MAX_DRAW = 2**31
# From this mean size of weights on, cutting a draw takes longer than a few more draws.
_LARGE_WEIGHT = 2**17


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, or of noise."""
    of_rows = [t for t in tensors if isinstance(t, RowNoise)]
    squares = [t.sum_of_squares() for t in of_rows]
    if len(of_rows) < len(tensors):
        squares.append(
            sum_of_squares([t for t in tensors if not isinstance(t, RowNoise)])
        )
    return ops.sqrt(sum(squares))


def reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for a norm of 0."""
    is_zero = norm == 0
    return ops.where(is_zero, 0.0 * norm, 1.0 / ops.where(is_zero, 1.0 + norm, norm))


def common_dtype(tensors: Sequence[Any]) -> str:
    """float64 if any tensor has it, otherwise float32."""
    dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors}
    return "float64" if "float64" in dtypes else "float32"


def _num_elements(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def shaped_like(weights: list[Tensor], tensors: list[Any]) -> list[Any]:
    """The tensors, or parts of one flat tensor, in the shapes of the weights."""
    if len(tensors) == len(weights):
        return [
            t if isinstance(t, RowNoise | RowDelta) else reshape(t, w.shape)
            for w, t in zip(weights, tensors, strict=True)
        ]
    (flat,) = tensors
    ends = list(itertools.accumulate(math.prod(w.shape) for w in weights))
    return [
        reshape(flat[start:end], w.shape)
        for w, start, end in zip(weights, [0, *ends], ends, strict=False)
    ]


def scaled_noise(weights: list[Tensor], noise: list[Any], scale: Tensor) -> list[Any]:
    """Noise times a scalar, in the shapes of the weights.

    The noise is scaled in place where that is possible: a pass over memory less.
    """

    def times_scale(_: Any, g: Tensor) -> Tensor:
        return operator.imul(g, scale)  # type: ignore[no-untyped-call]

    return shaped_like(weights, [delta_of(times_scale, None, g) for g in noise])


def in_one_dtype(weights: Any, eps: Any) -> tuple[list[Tensor], Tensor]:
    """The weights and eps as tensors of float64 if any weight has it, else float32.

    Raises:
        TypeError, ValueError: if they are no list of tensors, or no number >= 0.
    """
    is_list = isinstance(weights, list | tuple)
    if not is_list or not all(hasattr(w, "shape") for w in weights):
        raise TypeError(
            "`weights` must be a list of tensors or variables. Received: weights "
            f"of type {type(weights).__name__}. For example: "
            "weights=model.trainable_variables"
        )
    eps = check_scalar("eps", eps)
    tensors = [ops.convert_to_tensor(w) for w in weights]
    dtype = common_dtype(tensors)
    tensors = [ops.cast(w, dtype) for w in tensors]
    return tensors, ops.convert_to_tensor(eps, dtype)


def random_stream(rng: Any) -> RandomStream:
    """A `RandomStream` of an int, a `SeedGenerator`, a key, or another stream."""
    if isinstance(rng, RandomStream):
        return rng
    if isinstance(rng, Integral):
        rng = keras.random.SeedGenerator(check_seed("rng", rng))
    if isinstance(rng, keras.random.SeedGenerator):
        rng = rng.next()
    if tuple(getattr(rng, "shape", ())) != (2,):
        raise TypeError(
            "`rng` must be an int, a keras.random.SeedGenerator, or a key of shape "
            f"(2,) from its next(). Received: rng={rng!r}."
        )
    return RandomStream(rng)


class RandomNoise(Perturbation):
    """A perturbation made of random noise.

    Args:
        noise: Distribution of the elements of the noise, one of `NOISES`.
        where: As in `Perturbation`.
    """

    def __init__(self, *, noise: str = "normal", where: Where = None) -> None:
        super().__init__(where=where)
        self.noise = check_choice("noise", noise, NOISES)

    def sample(
        self,
        weights: Sequence[Any],
        eps: Tensor,
        rng: Any,
        *,
        tables: Sequence[bool] | None = None,
    ) -> list[Any]:
        """Draw one delta, as in `Perturbation`.

        Args:
            weights, eps, rng: As in `Perturbation`.
            tables: For each weight whether it is a table of which few rows are read,
                on JAX and TensorFlow. It gets a `RowDelta`. By default none is.

        Raises:
            TypeError, ValueError: if an argument is not as described.
        """
        tensors, eps = in_one_dtype(weights, eps)
        if not tensors:
            return []
        tables = [False] * len(tensors) if tables is None else tables
        return self._draw(tensors, eps, random_stream(rng), tables)

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        """delta for weights of one dtype."""
        raise NotImplementedError

    def _noise(
        self,
        weights: list[Tensor],
        rng: RandomStream,
        tables: Sequence[bool],
        *,
        whole: bool = True,
    ) -> list[Any]:
        """Independent noise for every element.

        One flat tensor for all weights, which takes fewer operations, or a tensor for
        each weight, if they are sharded, or large and costly to cut, or `whole` is
        false. Tables have a `RowNoise`.
        """
        draw = rng.normal if self.noise == "normal" else rng.rademacher
        dtype = keras.backend.standardize_dtype(weights[0].dtype)
        if any(tables):
            others = [w for w, t in zip(weights, tables, strict=True) if not t]
            none = [False] * len(others)
            drawn: list[Any] = []
            if others:
                drawn = self._noise(others, rng, none, whole=whole)
            of_others = iter(shaped_like(others, drawn))
            return [
                RowNoise(rng, self.noise, tuple(w.shape), dtype)
                if is_table
                else next(of_others)
                for w, is_table in zip(weights, tables, strict=True)
            ]
        size = _num_elements(weights)
        whole = whole and (rng.cuts_whole or size < _LARGE_WEIGHT * len(weights))
        if whole and rng.draws_whole and size < _MAX_DRAW:
            return [draw((size,), dtype)]
        return [draw(tuple(w.shape), dtype) for w in weights]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"noise": self.noise}


class RandomRadius(RandomNoise):
    """Random noise, scaled by a random factor.

    Args:
        radius: Distribution of the factor, one of `RADII`, or `None` for the default of
            the class.
        noise: As in `RandomNoise`.
        where: As in `Perturbation`.
    """

    default_radius = "uniform"

    def __init__(
        self,
        *,
        radius: str | None = None,
        noise: str = "normal",
        where: Where = None,
    ) -> None:
        super().__init__(noise=noise, where=where)
        if radius is None:
            radius = self.default_radius
        self.radius = check_choice("radius", radius, RADII)

    def _relative_radius(self, weights: list[Tensor], rng: RandomStream) -> Tensor:
        """The factor u in [0, 1]."""
        if self.radius == "sphere":
            return 1.0
        uniform = rng.uniform((), keras.backend.standardize_dtype(weights[0].dtype))
        if self.radius == "volume":
            return uniform ** (1.0 / max(1, _num_elements(weights)))
        return uniform

    def _in_ball(
        self,
        weights: list[Tensor],
        radius: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        """A random point in a ball of the given radius around zero."""
        noise = self._noise(weights, rng, tables)
        factor = ROUNDING_MARGIN * self._relative_radius(weights, rng)
        return scaled_noise(weights, noise, radius * factor * reciprocal(norm(noise)))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"radius": self.radius}
