"""Search for an eps that is neither inert nor destructive."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs import perturbations
from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive
from keras_nrs.batches import Batches
from keras_nrs.divergence_meter import divergence_meter
from keras_nrs.divergence_meter import keys_of_samples

# The search starts here, goes on by factors of 2, and ends with a bisection.
_START, _LARGEST_FACTOR, _PRECISION = 0.1, 2.0**30, 1.01


class CalibratedEps(float):
    """An eps, and how well it meets its target.

    Attributes:
        divergence: Mean model divergence at this eps, over the sampled deltas.
        standard_error: Standard error of that mean.
        perturbation: The perturbation that it was found for. `wrap()` accepts no
            other.
    """

    divergence: float
    standard_error: float
    perturbation: perturbations.Perturbation

    def __new__(
        cls, eps: float, samples: np.ndarray, perturbation: perturbations.Perturbation
    ) -> "CalibratedEps":
        self = super().__new__(cls, eps)
        self.perturbation = perturbation
        self.divergence = float(np.mean(samples))
        spread = np.std(samples, ddof=1) if len(samples) > 1 else math.nan
        self.standard_error = float(spread / math.sqrt(len(samples)))
        return self

    def __getnewargs__(self) -> Any:
        # Copies and pickles get the other attributes from `__dict__`.
        return float(self), np.array([self.divergence]), self.perturbation

    def __repr__(self) -> str:
        return (
            f"CalibratedEps({float(self):.4g}, divergence={self.divergence:.3g}, "
            f"standard_error={self.standard_error:.2g})"
        )


def calibrate_eps(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    *,
    target_divergence: float,
    perturbation: str | perturbations.Perturbation | None = None,
    divergence: Any = None,
    num_samples: int = 16,
    batch_size: int = 32,
    seed: int = 0,
) -> CalibratedEps:
    """Find the eps at which the model divergence has a given mean.

    In inference mode it draws `num_samples` perturbations, and scales them together
    until the mean divergence over them and over `x` reaches the target, first by
    factors of 2, then by bisection to 1 %. All values of eps use the same noise, so the
    estimate grows smoothly with eps.

    A new network has nearly equal outputs, and so a small divergence, which grows in
    training. Calibrate a network that was trained for a short time. With a relative eps
    above 0.5 training can diverge: if the result is larger, lower the target.

    Args:
        model: A built model, wrapped or not.
        x: Inputs: an array of shape `(num_inputs, ...)`, a list or dict of arrays, or
            batches from a data set or generator. A few hundred inputs are enough. All
            inputs are held in memory.
        target_divergence: Mean model divergence to reach, > 0, in the unit of the
            divergence (nats for the Kullback-Leibler divergences).
        perturbation: As in `keras_nrs.wrap`. Defaults to the perturbation of a wrapped
            model, and to `"relative"` for other models.
        divergence: As in `keras_nrs.wrap`. Defaults to the divergence of a wrapped
            model, and to `"auto"`, which needs a compiled model, for other models.
        num_samples: Number of perturbations, >= 1. Raise it if the standard error is
            large compared with the divergence.
        batch_size: Number of inputs at a time, >= 1.
        seed: Seed of the perturbations.

    Returns:
        eps, a `float` with three more attributes: `divergence`, the mean divergence at
        this eps, `standard_error`, the standard error of that mean (NaN for one
        sample), and `perturbation`. Without labels, positions of a loss's
        `ignore_class` count.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the target cannot
            be reached.

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> x = keras.random.normal((64, 4), seed=0)
    >>> eps = keras_nrs.calibrate_eps(model, x, target_divergence=0.05)
    >>> abs(eps.divergence - 0.05) < 0.005
    True
    """
    target = check_positive("target_divergence", target_divergence)
    num_samples = check_int("num_samples", num_samples, minimum=1)
    keys = keys_of_samples(seed, num_samples)
    meter = divergence_meter(model, perturbation=perturbation, divergence=divergence)
    batches = list(Batches(meter.model, x, batch_size=batch_size))
    outputs = [meter.outputs(batch) for batch in batches]
    sizes = [batch.num_samples for batch in batches]
    if not meter.model.trainable_variables:
        raise ValueError(
            "`model` must have trainable weights to perturb. Received: a model named "
            f"{meter.model.name!r} without any."
        )
    if not all(map(_outputs_are_finite, outputs)):
        raise ValueError(
            "`model` must have finite outputs on `x`. Received: a model named "
            f"{meter.model.name!r} with outputs that are not finite. Look for NaN in "
            "`x` and in the weights: training may have diverged."
        )

    def divergences_at(eps: float) -> np.ndarray:
        values = [
            [
                meter.divergence(batch, clean, eps, key)
                for batch, clean in zip(batches, outputs, strict=True)
            ]
            for key in keys
        ]
        return np.average(values, axis=1, weights=sizes)

    low, high = _bracket(divergences_at, target)
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if _reaches_target(divergences_at(middle), target):
            high = middle
        else:
            low = middle
    samples = divergences_at(high)
    if not np.isfinite(np.mean(samples)):
        raise _unreachable(target, low, divergences_at(low))
    return CalibratedEps(high, samples, meter.perturbation)


def _outputs_are_finite(outputs: Any) -> bool:
    arrays = map(ops.convert_to_numpy, keras.tree.flatten(outputs))
    return all(np.isfinite(array.astype("float64")).all() for array in arrays)


def _reaches_target(samples: np.ndarray, target: float) -> bool:
    """Whether the mean reaches the target. NaN counts: it comes from a large eps."""
    return not float(np.mean(samples)) < target


def _bracket(
    divergences_at: Callable[[float], np.ndarray], target: float
) -> tuple[float, float]:
    """Two values of eps, a factor of 2 apart, with the target between them."""
    eps = _START
    samples = divergences_at(eps)
    factor = 0.5 if _reaches_target(samples, target) else 2.0
    while _reaches_target(samples, target) == (factor < 1):
        eps *= factor
        if not _START / _LARGEST_FACTOR < eps < _START * _LARGEST_FACTOR:
            raise _unreachable(target, eps, samples)
        samples = divergences_at(eps)
    return (eps, 2 * eps) if factor < 1 else (eps / 2, eps)


def _unreachable(target: float, eps: float, samples: np.ndarray) -> ValueError:
    return ValueError(
        f"`target_divergence` cannot be reached. Received: target_divergence={target}. "
        f"At eps={eps:.3g} the mean divergence is {float(np.mean(samples)):.3g}. Pass "
        "a target that the outputs can reach, and a perturbation that changes them."
    )
