"""Perturbations along the gradient of the loss, as sharpness-aware minimization has."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_nrs._checks import check_nonnegative
from keras_nrs.perturbations.perturbation import Perturbation
from keras_nrs.perturbations.perturbation import Where
from keras_nrs.perturbations.random_noise import in_one_dtype
from keras_nrs.perturbations.random_noise import norm
from keras_nrs.perturbations.random_noise import reciprocal

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_nrs")
class Ascent(Perturbation):
    """delta along the gradient of the loss, where the loss grows fastest.

    `delta = eps * g / norm(g)`, where g is the gradient at theta of the loss of the
    samples that share this delta, without weight penalties, and the norm is over all
    weights together. Nothing about it is random. It is 0 for a gradient that is 0 or
    not finite. `scheme="sam"` uses it.

    Args:
        where: As in `Ball`.

    Reference: [Foret et al., 2021](https://arxiv.org/abs/2010.01412), Equation 2.

    Example:

    >>> import keras, keras_nrs
    >>> theta, gradient = keras.ops.array([1.0, 1.0]), keras.ops.array([3.0, 4.0])
    >>> ascent = keras_nrs.perturbations.Ascent()
    >>> (delta,) = ascent.sample([theta], 0.5, 0, gradients=[gradient])
    >>> print(keras.ops.convert_to_numpy(delta).round(3))
    [0.3 0.4]
    """

    needs_gradients = True

    def sample(  # type: ignore[override]
        self, weights: Sequence[Any], eps: Tensor, rng: Any, *, gradients: Sequence[Any]
    ) -> list[Tensor]:
        """delta for these gradients: `rng` is not used. See `Perturbation.sample`."""
        values, eps = in_one_dtype(weights, eps)
        steps = [ops.cast(g, values[0].dtype) for g in gradients]
        scales = [self._scale(value) for value in values]
        steps = list(map(_scaled, scales, steps))
        length = norm(steps)
        factor = eps * reciprocal(length)
        # Where a scaled loss overflows, the optimizer leaves out the step. Without a
        # delta its loss is a number all the same.
        is_finite = ops.isfinite(length)
        zero = ops.zeros((), length.dtype)
        return [
            ops.where(is_finite, factor * step, zero)
            for step in map(_scaled, scales, steps)
        ]

    def _scale(self, weight: Tensor) -> Tensor | None:
        """The scale T of the neighborhood in each direction, `None` for 1."""
        return None


def _scaled(scale: Tensor | None, step: Tensor) -> Tensor:
    return step if scale is None else scale * step


@keras.saving.register_keras_serializable(package="keras_nrs")
class AdaptiveAscent(Ascent):
    """delta along the gradient, in a neighborhood that scales with each weight.

    `delta = eps * T**2 * g / norm(T * g)` with `T = |theta| + eta` for kernels, and 1
    for biases, scales and other weights of rank 0 and 1. `scheme="asam"` uses it.

    Args:
        eta: Least scale of the elements of kernels, >= 0.
        where: As in `Ball`.

    Reference: [Kwon et al., 2021](https://arxiv.org/abs/2102.11600), Equation 6, and
    eta of the authors' code.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.5, scheme="asam")
    ```
    """

    def __init__(self, *, eta: float = 0.01, where: Where = None) -> None:
        super().__init__(where=where)
        self.eta = check_nonnegative("eta", eta)

    def _scale(self, weight: Tensor) -> Tensor | None:
        return None if len(weight.shape) < 2 else ops.abs(weight) + self.eta

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"eta": self.eta}
