"""The model divergence of a trained model."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_nrs import perturbations
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs.batches import Batches
from keras_nrs.divergence_meter import divergence_meter
from keras_nrs.divergence_meter import keys_of_samples
from keras_nrs.flatness.progress import Progress

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ModelDivergence:
    """A mean divergence over random perturbations.

    Attributes:
        mean: Mean model divergence, in the unit of the divergence (nats for the
            Kullback-Leibler divergences).
        standard_error: Standard error of the mean. NaN for one perturbation.
        values: Shape `(num_samples,)`, the divergence under each perturbation.
    """

    mean: float
    standard_error: float
    values: Array


def model_divergence(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    eps: float,
    perturbation: str | perturbations.Perturbation | None = None,
    divergence: Any = None,
    num_samples: int = 16,
    batch_size: int = 32,
    steps: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> ModelDivergence:
    """The model divergence d(theta, theta + delta), averaged over delta.

    In inference mode. The noise of delta is the same for all models of one architecture
    and one seed; only its scale depends on the weights.

    Args:
        model: A built model, wrapped or not.
        x: Inputs: an array of shape `(num_inputs, ...)` or a list or dict of them, or
            batches from a `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`
            of PyTorch or a generator. Only one batch at a time is held.
        y: Labels, if `x` is arrays. Only losses with `ignore_class` need them.
        eps: Size of the perturbations, >= 0, as in `keras_nrs.wrap`.
        perturbation: As in `keras_nrs.wrap`. Defaults to the perturbation of a wrapped
            model, and to `"relative"` for other models.
        divergence: As in `keras_nrs.wrap`. Defaults to the divergence of a wrapped
            model, and to `"auto"`, which needs a compiled model, for other models.
        num_samples: Number of perturbations, >= 1.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        seed: Seed of the perturbations.
        verbose: 1 to show progress.

    Returns:
        A `ModelDivergence`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Definition 2.

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> x = keras.random.normal((64, 4), seed=0)
    >>> result = keras_nrs.flatness.model_divergence(model, x, eps=0.5)
    >>> 0 < result.standard_error < result.mean < 0.5
    True
    """
    eps = check_nonnegative("eps", eps)
    num_samples = check_int("num_samples", num_samples, minimum=1)
    keys = keys_of_samples(seed, num_samples)
    meter = divergence_meter(model, perturbation=perturbation, divergence=divergence)
    batches = Batches(meter.model, x, y, batch_size=batch_size, steps=steps)
    total = num_samples * len(batches) if verbose else None
    progress = Progress(verbose, total, "pass")
    totals = np.zeros(num_samples)
    count = 0
    for batch in batches:
        clean = meter.outputs(batch)
        n = batch.num_samples
        for i, key in enumerate(keys):
            totals[i] += n * meter.divergence(batch, clean, eps, key)
            progress.advance()
        count += n
    progress.finish()
    values = totals / count
    spread = np.std(values, ddof=1) if num_samples > 1 else math.nan
    return ModelDivergence(
        mean=float(np.mean(values)),
        standard_error=float(spread / math.sqrt(num_samples)),
        values=values,
    )
