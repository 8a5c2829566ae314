"""Finding an eps that is neither inert nor destructive."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs import divergences
from keras_nrs import perturbations
from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.nrs_model import NRSModel

# eps is searched by factors of 2 from here, and then bisected to this precision.
_START, _LARGEST_FACTOR, _PRECISION = 0.1, 2.0**30, 1.01


class CalibratedEps(float):
    """An eps, with how well it meets its target.

    Attributes:
        divergence: Mean model divergence at this eps, over the sampled deltas.
        standard_error: Standard error of that mean.
    """

    divergence: float
    standard_error: float

    def __new__(cls, eps: float, samples: np.ndarray) -> "CalibratedEps":
        self = super().__new__(cls, eps)
        self.divergence = float(np.mean(samples))
        spread = np.std(samples, ddof=1) if len(samples) > 1 else math.nan
        self.standard_error = float(spread / math.sqrt(len(samples)))
        return self

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

    Draws `num_samples` perturbations, in inference mode, and scales all of them
    together until the mean divergence over them and over `x` reaches the target:
    first by factors of 2, then by bisection to 1 %. As the same noise is used at
    every eps, the estimate grows smoothly with eps.

    The divergence of a network grows while it is trained, so calibrate a model that
    has been trained for a little while. Where NRS helped in our measurements, the
    divergence during training was between 0.01 and 0.3.

    Args:
        model: A built model, wrapped or not.
        x: Inputs: array or list or dict of arrays of shape `(num_inputs, ...)`. A few
            hundred are enough.
        target_divergence: Mean model divergence to reach, > 0, in the unit of the
            divergence (nats for the Kullback-Leibler divergences).
        perturbation: As in `keras_nrs.wrap`. Defaults to that of a wrapped model,
            and to `"ball"` for others.
        divergence: As in `keras_nrs.wrap`. Defaults to that of a wrapped model, and
            to `"auto"`, which needs a compiled model, for others.
        num_samples: Number of perturbations, >= 1. Raise it if the standard error is
            not small against the divergence.
        batch_size: Number of inputs at a time, >= 1.
        seed: Seed of the perturbations.

    Returns:
        eps, a `float` with two attributes: `divergence`, the mean that it gives, and
        `standard_error`, the standard error of that mean (NaN for one sample). There
        are no labels here, so positions of a loss's `ignore_class` count.

    Raises:
        TypeError, ValueError: if an argument is not as described, or if the target
            cannot be reached.

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
    batch_size = check_int("batch_size", batch_size, minimum=1)
    seed = check_int("seed", seed, minimum=0, maximum=2**31 - 1 - num_samples)
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    resolved = None
    if isinstance(model, NRSModel):
        perturbation = perturbation or model.perturbation
        if divergence is None:
            divergence, resolved = model.divergence_in_use()
        model = model.base_model
    perturbation = perturbations.get(perturbation or "ball")
    divergence = divergences.check(divergence or "auto")
    batches = _batches(model, x, batch_size)
    kwargs = {"training": False} if model._call_has_training_arg else {}
    outputs = [model(batch, **kwargs) for batch in batches]
    if resolved is None:
        resolved = divergences.for_model(model, divergence, outputs[0])
    measure = _divergence_function(
        model,
        list(zip(batches, outputs, strict=True)),
        perturbation,
        resolved,
        keys=[keras.random.SeedGenerator(seed + i).next() for i in range(num_samples)],
    )
    low, high = _bracket(measure, target)
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if _reaches(measure(middle), target):
            high = middle
        else:
            low = middle
    return CalibratedEps(high, measure(high))


def _batches(model: Any, x: Any, batch_size: int) -> list[Any]:
    """Preprocessed batches of inputs."""
    lengths = {len(leaf) for leaf in keras.tree.flatten(x) if hasattr(leaf, "__len__")}
    arrays = all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x))
    if not arrays or len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "`x` must be an array, or a list or dict of arrays of equal length, with "
            f"at least one input. Received: x of type {type(x).__name__}."
        )
    preprocess = getattr(model, "preprocess_samples", lambda inputs: inputs)

    def batch(start: int) -> Any:
        inputs = keras.tree.map_structure(lambda a: a[start : start + batch_size], x)
        return keras.tree.map_structure(ops.convert_to_tensor, preprocess(inputs))

    return [batch(start) for start in range(0, lengths.pop(), batch_size)]


def _divergence_function(
    model: Any,
    batches: list[tuple[Any, Any]],
    perturbation: perturbations.Perturbation,
    resolved: list[divergences.OutputDivergence],
    *,
    keys: list[Any],
) -> Callable[[float], np.ndarray]:
    """The function from eps to the mean divergence under each key's delta.

    `batches` are of inputs and of the model's outputs for them.
    """
    kwargs = {"training": False} if model._call_has_training_arg else {}
    variables = model.trainable_variables
    weights = [ops.convert_to_tensor(v.value) for v in variables]
    state = [ops.convert_to_tensor(v.value) for v in model.non_trainable_variables]

    def batch_divergence(batch: Any, clean: Any, eps: Any, key: Any) -> Any:
        deltas = perturbations.sample_deltas(
            perturbation, variables, weights, eps, RandomStream(key)
        )
        perturbed, _ = model.stateless_call(
            perturbations.add_deltas(weights, deltas), state, batch, **kwargs
        )
        return divergences.total_divergence(resolved, None, clean, perturbed, None)

    compiled = compile_function(batch_divergence)
    sizes = [len(keras.tree.flatten(batch)[0]) for batch, _ in batches]

    def measure(eps: float) -> np.ndarray:
        eps_tensor = ops.convert_to_tensor(eps, "float32")
        values = [
            [
                float(ops.convert_to_numpy(compiled(batch, clean, eps_tensor, key)))
                for batch, clean in batches
            ]
            for key in keys
        ]
        return np.average(values, axis=1, weights=sizes)

    return measure


def _reaches(samples: np.ndarray, target: float) -> bool:
    """Whether the mean reaches the target; a model that breaks down is beyond it."""
    mean = float(np.mean(samples))
    return not mean < target


def _bracket(
    measure: Callable[[float], np.ndarray], target: float
) -> tuple[float, float]:
    """Two values of eps, a factor of 2 apart, with the target between them."""
    eps = _START
    samples = measure(eps)
    factor = 0.5 if _reaches(samples, target) else 2.0
    while _reaches(samples, target) == (factor < 1):
        eps *= factor
        if not _START / _LARGEST_FACTOR < eps < _START * _LARGEST_FACTOR:
            raise ValueError(
                f"`target_divergence` cannot be reached. Received: target_divergence="
                f"{target}. At eps={eps:.3g} the mean divergence is "
                f"{float(np.mean(samples)):.3g}. Pass a target that the outputs can "
                "reach, and a perturbation that changes them."
            )
        samples = measure(eps)
    return (eps, 2 * eps) if factor < 1 else (eps / 2, eps)
