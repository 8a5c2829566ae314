"""delta that is noise times a scale, and so has no fixed length."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_nrs.backend import RandomStream
from keras_nrs.perturbations.random_noise import RandomNoise
from keras_nrs.perturbations.random_noise import RandomRadius
from keras_nrs.perturbations.random_noise import norm
from keras_nrs.perturbations.random_noise import reciprocal
from keras_nrs.perturbations.random_noise import scaled_noise
from keras_nrs.perturbations.random_noise import shaped_like
from keras_nrs.perturbations.row_noise import delta_of

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_nrs")
class ReleasedCode(RandomRadius):
    """delta as the authors' released code scales it, which differs from the paper.

    `delta = eps * u * g / norm(theta)`. The noise g is divided by the norm of the
    weights, not by its own. With `"normal"` noise `norm(delta)` is about `eps * u *
    sqrt(n) / norm(theta)`, which is tens of times eps for WideResNet-28-10. The paper's
    results were made with this code. Two things differ here: weights of equal shape get
    independent noise, and no gradient flows through the scale.

    Args:
        radius: Distribution of u, as in `Ball`. Defaults to `"uniform"`, as in the
            released code.
        noise: As in `Ball`.
        where: As in `Ball`. The norm is over the perturbed weights.

    Reference: <https://github.com/zhaoyang-0204/nrs>, cited by the paper.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.1, perturbation="released")
    ```
    """

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        noise = self._noise(weights, rng, tables)
        factor = self._relative_radius(weights, rng)
        return scaled_noise(weights, noise, eps * factor * reciprocal(norm(weights)))


@keras.saving.register_keras_serializable(package="keras_nrs")
class ElementwiseNoise(RandomNoise):
    """Multiplicative noise: each weight moves by a share of its own size.

    `delta = eps * theta * g`, where g is random noise. The norm of delta is about
    `eps * norm(theta)`. Weights that are zero stay unperturbed.

    Args:
        noise: Distribution of the elements of g, as in `Ball`.
        where: As in `Ball`.

    Reference: [Trinh et al., 2024](https://arxiv.org/abs/2406.16540), who train at
    theta + delta (`scheme="rpr"`) with another g in each part of a batch
    (`perturbations_per_replica`).

    Example:

    >>> import keras, keras_nrs
    >>> noise = keras_nrs.perturbations.ElementwiseNoise(noise="rademacher")
    >>> (delta,) = noise.sample([keras.ops.array([1.0, -2.0, 0.0])], 0.1, 0)
    >>> print(keras.ops.convert_to_numpy(keras.ops.abs(delta)))
    [0.1 0.2 0. ]
    """

    def _draw(
        self,
        weights: list[Tensor],
        eps: Tensor,
        rng: RandomStream,
        tables: Sequence[bool],
    ) -> list[Any]:
        noise = shaped_like(weights, self._noise(weights, rng, tables))
        return [
            delta_of(lambda w, g: eps * w * g, weight, g)
            for weight, g in zip(weights, noise, strict=True)
        ]
