"""delta in a ball: of all weights, of each variable, or of each output unit."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_nrs.backend import RandomStream
from keras_nrs.backend import sums_of_squares
from keras_nrs.perturbations.random_noise import ROUNDING_MARGIN
from keras_nrs.perturbations.random_noise import RandomRadius
from keras_nrs.perturbations.random_noise import in_one_dtype
from keras_nrs.perturbations.random_noise import norm
from keras_nrs.perturbations.random_noise import random_stream
from keras_nrs.perturbations.random_noise import reciprocal
from keras_nrs.perturbations.random_noise import shaped_like
from keras_nrs.perturbations.row_noise import delta_of
from keras_nrs.unit_axes import Axes
from keras_nrs.unit_axes import unowned_axes

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_nrs")
class Ball(RandomRadius):
    """The paper's delta, in the ball B(0, eps) around all perturbed weights together.

    `delta = eps * u * g / norm(g)`, where g is random noise over all perturbed
    weights and u is in [0, 1].

    With the paper's eps = 0.1 this ball is so small that on every network we measured
    NRS did no more than double the loss. Use `RelativeBall`, whose radius grows with
    the norm of the weights, or find an eps with `keras_nrs.calibrate_eps`.

    Args:
        radius: Distribution of the length of delta. `"volume"`: delta is uniform in
            the ball, `u = U ** (1 / n)` with U uniform in [0, 1] and n the number of
            perturbed weights. `"uniform"`: `u = U`. `"sphere"`: `u = 1`. Defaults to
            `"volume"`.
        noise: Distribution of the elements of g. `"normal"`: standard normal, so the
            direction is uniform on the sphere. On JAX and TensorFlow its elements
            take 1,021 values (`keras_nrs/noise.py`), on PyTorch's CPU 65,536.
            `"rademacher"`: -1 or 1, cheaper.
        where: `None` for all trainable variables, `"kernels"` for all but biases and
            normalization, or a predicate of a `keras.Variable`.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Algorithm 1.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=5.0, perturbation=Ball(radius="sphere"))
    ```
    """

    default_radius = "volume"

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        return self._in_ball(weights, eps, rng, tables)


@keras.saving.register_keras_serializable(package="keras_nrs")
class RelativeBall(RandomRadius):
    """delta in a ball whose radius is eps times the norm of the weights.

    `delta = eps * norm(theta) * u * g / norm(g)`. eps has no unit, and its values carry
    over between networks. Start with 0.2, then try 0.1 to 0.4; above 0.5 training can
    diverge.

    Args:
        radius: As in `Ball`. Defaults to `"uniform"`.
        noise: As in `Ball`.
        where: As in `Ball`. The norm is over the perturbed weights.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.2, perturbation="relative")
    ```
    """

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        return self._in_ball(weights, eps * norm(weights), rng, tables)


@keras.saving.register_keras_serializable(package="keras_nrs")
class LayerwiseBall(RandomRadius):
    """delta in a ball for each variable, whose radius is eps times its norm.

    `delta_l = eps * norm(theta_l) * u_l * g_l / norm(g_l)` for each variable l. A
    variable that is zero, such as a fresh bias, stays unperturbed. Useful values of
    eps are smaller than those of `RelativeBall`: 0.1 to 0.2.

    Args:
        radius: As in `Ball`. Defaults to `"uniform"`, drawn for each variable.
        noise: As in `Ball`.
        where: As in `Ball`.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.15, perturbation="layerwise")
    ```
    """

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        deltas = []
        for weight, is_table in zip(weights, tables, strict=True):
            radius = eps * norm([weight])
            deltas += self._in_ball([weight], radius, rng, [is_table])
        return deltas


@keras.saving.register_keras_serializable(package="keras_nrs")
class FilterwiseBall(RandomRadius):
    """delta in a ball for each output unit, whose radius is eps times its norm.

    `delta_j = eps * norm(theta_j) * u * g_j / norm(g_j)` for the weights theta_j of
    each output unit j, with one u for all units. A unit, or filter, is one output
    channel of a kernel, one token of an embedding, or a whole bias or scale:
    `keras_nrs.unit_axes.unit_axes` says so for each layer. A unit that is zero, such
    as a fresh bias, stays unperturbed.

    Scaling the weights of a unit scales its delta. So a network with BatchNorm, which
    undoes such a scale, gets the same perturbed outputs. Start with eps from 0.1 to
    0.15. On a network without normalization 0.3 cost 14 points of accuracy.

    Args:
        radius: As in `Ball`, for all units together. Defaults to `"sphere"`.
        noise: As in `Ball`.
        where: As in `Ball`.

    References:
        [Li et al., 2018](https://arxiv.org/abs/1712.09913), Section 4, for filters of
        random directions; [Bisla et al., 2022](https://arxiv.org/abs/2201.08025), for
        noise of their norms.

    Example:

    >>> import keras, keras_nrs
    >>> ball = keras_nrs.perturbations.FilterwiseBall()
    >>> kernel = keras.ops.array([[3.0, 0.6], [4.0, 0.8]])
    >>> (delta,) = ball.sample([kernel], 0.1, 0)
    >>> print(keras.ops.convert_to_numpy(keras.ops.norm(delta, axis=0)).round(4))
    [0.5 0.1]
    """

    needs_units = True
    default_radius = "sphere"

    def sample(
        self,
        weights: Sequence[Any],
        eps: Tensor,
        rng: Any,
        *,
        tables: Sequence[bool] | None = None,
        units: Sequence[Axes] | None = None,
    ) -> list[Any]:
        """Draw one delta, as in `Perturbation`.

        Args:
            weights, eps, rng: As in `Perturbation`.
            tables: As in `RandomNoise`. Their rows must be units.
            units: For each weight the axes along which its units lie. By default the
                names of variables decide, and tensors have units along the last axis.

        Raises:
            TypeError, ValueError: if an argument is not as described.
        """
        tensors, eps = in_one_dtype(weights, eps)
        if not tensors:
            return []
        if units is None:
            units = [unowned_axes(weight) for weight in weights]
        _check_units(units, tensors)
        tables = [False] * len(tensors) if tables is None else tables
        tables = [t and axes == (0,) for t, axes in zip(tables, units, strict=True)]
        stream = random_stream(rng)
        noise = self._noise(tensors, stream, tables, whole=stream.cuts_whole)
        radius = eps * ROUNDING_MARGIN * self._relative_radius(tensors, stream)

        def in_units(axes: Axes, weight: Tensor, g: Tensor) -> Tensor:
            return radius * _norms(weight, axes) * reciprocal(_norms(g, axes)) * g

        return [
            delta_of(functools.partial(in_units, axes), weight, g)
            for weight, g, axes in zip(
                tensors, shaped_like(tensors, noise), units, strict=True
            )
        ]


def _check_units(units: Sequence[Axes], weights: list[Tensor]) -> None:
    ranks = [len(weight.shape) for weight in weights]
    is_list = isinstance(units, list | tuple) and len(units) == len(ranks)
    if not is_list or not all(
        isinstance(axes, tuple) and set(axes) <= set(range(rank))
        for axes, rank in zip(units, ranks, strict=True)
    ):
        raise ValueError(
            "`units` must be a list with a tuple of axes, numbered from 0, for each "
            f"weight. Received: units={units!r} for weights with {ranks} axes. "
            "keras_nrs.unit_axes.unit_axes(model) has those of all trainable variables."
        )


def _norms(tensor: Tensor, unit_axes: Axes) -> Tensor:
    """The norm of each unit, in a shape that broadcasts to the tensor's."""
    axes = [axis for axis in range(len(tensor.shape)) if axis not in unit_axes]
    if not axes:
        return ops.abs(tensor)
    return ops.sqrt(sums_of_squares(tensor, axes))
