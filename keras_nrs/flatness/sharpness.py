"""How much the loss rises in a neighborhood of the weights: mean and largest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray
from scipy import stats

from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs.backend import RandomStream
from keras_nrs.batches import Batches
from keras_nrs.divergence_meter import keys_of_samples
from keras_nrs.flatness.data_loss import DataLoss
from keras_nrs.flatness.data_loss import Values
from keras_nrs.flatness.data_loss import moments_batches
from keras_nrs.flatness.data_loss import to_tensors
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.neighborhood import Delta
from keras_nrs.flatness.neighborhood import Neighborhood
from keras_nrs.flatness.neighborhood import neighborhood_of
from keras_nrs.flatness.neighborhood import norm
from keras_nrs.flatness.progress import Progress
from keras_nrs.unit_axes import unit_axes

Array = NDArray[Any]

_CONFIDENCE = 0.95
_RESAMPLES = 1000
# With fewer batches a bootstrap says little.
_FEWEST_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """How much the loss rises around the weights, in the unit of the loss.

    Attributes:
        loss: The loss at the weights themselves.
        mean_increase: Mean of `L(theta + delta) - L(theta)` over random delta.
        mean_interval: Its 95 % interval over the draws of delta, by Student's t. NaN
            for one draw, or where the loss overflows.
        values: Shape `(num_samples,)`, the increase at each draw.
        largest_increase: The largest increase that was found in the neighborhood. It
            is a lower bound of the largest there is.
        largest_interval: A 95 % interval of the increase at this delta over batches
            of data: percentiles of 1,000 bootstrap samples. NaN for fewer than 8
            batches, or where the loss overflows.
        by_start: Shape `(num_starts,)`, the largest increase found from each start
            of the ascent. If they differ much, more starts or steps may find more.
    """

    loss: float
    mean_increase: float
    mean_interval: tuple[float, float]
    values: Array
    largest_increase: float
    largest_interval: tuple[float, float]
    by_start: Array

    @property
    def relative_increase(self) -> float:
        """`100 * largest_increase / (1 + loss)`, as Keskar et al. scale it."""
        return 100 * self.largest_increase / (1 + self.loss)


def sharpness(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    eps: float,
    perturbation: str | perturbations.Perturbation = "filterwise",
    num_samples: int = 16,
    num_starts: int = 3,
    num_steps: int = 5,
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    batch_norm_data: Any = None,
    seed: int = 0,
    verbose: int = 0,
) -> Sharpness:
    """The mean and the largest increase of the loss in a neighborhood of the weights.

    The mean is over random perturbations. The largest is the maximum over these and
    over points that an ascent finds in the neighborhood which holds them:

    - `"ball"`, `"relative"`: `norm(delta)` is at most eps, or eps times the norm of
      the weights.
    - `"layerwise"`, `"filterwise"`: for each variable, or each output unit, the norm
      of its delta is at most eps times its own. This is adaptive sharpness: scales
      that the next layer undoes do not change it.
    - Any other perturbation: the ball that holds the drawn delta.

    The ascent begins at theta and at the first `num_starts - 1` draws. Each of its
    steps goes to the point of the neighborhood that is farthest along the gradient of
    the loss over all data: `delta = radius * g / norm(g)`, for each ball. With one ball
    around all weights, the step from theta is that of sharpness-aware minimization. For
    a convex loss no step goes down.
    The result is a lower bound of the true maximum.

    In inference mode. The noise of delta is the same for all models of one architecture
    and one seed. It takes `num_samples` passes over the data, and `num_starts *
    num_steps` with gradients.

    Args:
        model: A built model, compiled with a loss, wrapped or not.
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`.
        y: Labels.
        eps: Size of the perturbations, >= 0, as in `keras_nrs.wrap`.
        perturbation: As in `keras_nrs.wrap`, but none that needs gradients. The
            variables that its `where` selects are moved.
        num_samples: Number of random perturbations, >= 1.
        num_starts: Number of starts of the ascent, from 1 to `num_samples + 1`.
        num_steps: Steps of the ascent from each start, >= 1.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.
        batch_norm_data: As in `loss_landscape`.
        seed: Seed of the perturbations and of the bootstrap.
        verbose: 1 to show progress.

    Returns:
        A `Sharpness`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        [Keskar et al., 2017](https://arxiv.org/abs/1609.04836), Equation 4, for the
        largest loss (in a box);
        [Foret et al., 2021](https://arxiv.org/abs/2010.01412), Equation 1, in a ball;
        [Kwon et al., 2021](https://arxiv.org/abs/2102.11600), Definition 2, adaptive,
        there with one bound for all units together.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> model.set_weights([np.ones((1, 1)), np.zeros(1)])
    >>> x = np.array([[-1.0], [1.0]], "float32")  # loss (w - 1) ** 2 + b ** 2
    >>> result = keras_nrs.flatness.sharpness(
    ...     model, x, x, eps=0.1, perturbation="ball"
    ... )
    >>> round(result.largest_increase, 4)
    0.01
    """
    chosen = _checked_perturbation(perturbation)
    eps = check_nonnegative("eps", eps)
    num_samples = check_int("num_samples", num_samples, minimum=1)
    num_starts = check_int("num_starts", num_starts, minimum=1, maximum=num_samples + 1)
    num_steps = check_int("num_steps", num_steps, minimum=1)
    check_bool("regularizers", regularizers)
    keys = keys_of_samples(seed, num_samples)
    model = base_model(model)
    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    moments = moments_batches(model, batch_norm_data, batch_size)
    progress = Progress(verbose, num_samples + num_starts * num_steps, "pass")
    around = _Surroundings(
        model, chosen, batches, regularizers=regularizers, moments_of=moments
    )
    clean = around.clean_loss()
    zero = [np.zeros_like(w) for w in around.weights]
    best, starts, widest = (0.0, zero), [zero], 0.0
    values = []
    for key in keys:
        delta = around.draw(eps, key)
        values.append(around.loss_at(delta) - clean)
        # A delta is as large as the model: all of them together need not fit.
        best = _best_of([(values[-1], delta), best])
        widest = max(widest, norm(delta))
        if len(starts) < num_starts:
            starts.append(delta)
        progress.advance()
    neighborhood = neighborhood_of(chosen, around.weights, around.units, eps, widest)
    by_start = []
    for start in starts:
        loss, delta = around.ascend(start, neighborhood, num_steps, progress)
        by_start.append(loss - clean)
        best = _best_of([best, (by_start[-1], delta)])
    progress.finish()
    return Sharpness(
        loss=clean,
        mean_increase=float(np.mean(values)),
        mean_interval=_t_interval(np.array(values)),
        values=np.array(values),
        largest_increase=best[0],
        largest_interval=_bootstrap(*around.increases_by_batch(best[1]), seed),
        by_start=np.array(by_start),
    )


def _checked_perturbation(
    perturbation: str | perturbations.Perturbation,
) -> perturbations.Perturbation:
    chosen = perturbations.get_perturbation(perturbation)
    if chosen.needs_gradients:
        raise ValueError(
            "`perturbation` must be a random one. Received: perturbation="
            f"{perturbation!r}, which follows the gradient. The largest increase is "
            "searched along it anyway: perturbation='ball'"
        )
    return chosen


class _Surroundings:
    """The losses of a model at moved weights.

    Attributes:
        weights: Values of the perturbed variables, in float64.
        units: Their axes along which output units lie.
    """

    def __init__(
        self,
        model: Any,
        perturbation: perturbations.Perturbation,
        batches: Batches,
        *,
        regularizers: bool,
        moments_of: Batches | None,
    ) -> None:
        self._model = model
        self._perturbation = perturbation
        self._values = stateless.current_values(model)
        variables = model.trainable_variables
        self._places = [
            i
            for i, v in enumerate(variables)
            if not v.overwrite_with_gradient and perturbation.selects(v)
        ]
        self._loss = DataLoss(
            model,
            batches,
            regularizers=regularizers,
            variables=[variables[i] for i in self._places],
            moments_of=moments_of,
        )
        tensors, _ = self._values
        self.weights = [
            ops.convert_to_numpy(tensors[i]).astype("float64") for i in self._places
        ]
        of_all = unit_axes(model)
        self.units = [of_all[i] for i in self._places]

    def draw(self, eps: float, key: Any) -> Delta:
        """The delta that belongs to a key, of the perturbed variables."""
        deltas = perturbations.sample_deltas(
            self._perturbation,
            self._model,
            self._values[0],
            ops.convert_to_tensor(eps, "float32"),
            RandomStream(key),
        )
        chosen = [deltas[i] for i in self._places]
        return [ops.convert_to_numpy(delta).astype("float64") for delta in chosen]

    def clean_loss(self) -> float:
        """The loss at the weights themselves."""
        return self._loss(self._values)

    def increases_by_batch(self, delta: Delta) -> tuple[Array, Array]:
        """By how much the loss of each batch rises, and its number of samples."""
        losses, counts = self._loss.by_batch(self._values, self._moved(delta))
        return losses[1] - losses[0], counts

    def loss_at(self, delta: Delta) -> float:
        return _or_infinite(self._loss(self._moved(delta)))

    def ascend(
        self,
        start: Delta,
        neighborhood: Neighborhood,
        num_steps: int,
        progress: Progress,
    ) -> tuple[float, Delta]:
        """The largest loss that an ascent from a start finds, and where."""
        delta, found = start, []
        for _ in range(num_steps):
            loss, gradient = self._loss.with_gradient(self._moved(delta))
            found.append((_or_infinite(loss), delta))
            progress.advance()
            if not all(np.isfinite(part).all() for part in gradient):
                return _best_of(found)
            delta = neighborhood.farthest(gradient)
        return _best_of([*found, (self.loss_at(delta), delta)])

    def _moved(self, delta: Delta) -> Values:
        weights, state = self._values
        like = [weights[i] for i in self._places]
        pairs = zip(self.weights, delta, strict=True)
        moved = to_tensors([w + d for w, d in pairs], like)
        all_weights = list(weights)
        for i, tensor in zip(self._places, moved, strict=True):
            all_weights[i] = tensor
        return all_weights, state


def _or_infinite(loss: float) -> float:
    """The loss, infinite where it overflows."""
    return math.inf if math.isnan(loss) else loss


def _best_of(found: Sequence[tuple[float, Delta]]) -> tuple[float, Delta]:
    return max(found, key=lambda pair: pair[0])


def _t_interval(values: Array) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
    mean, width = np.mean(values), quantile * stats.sem(values)
    return float(mean - width), float(mean + width)


def _bootstrap(increases: Array, counts: Array, seed: int) -> tuple[float, float]:
    """The 95 % interval of a mean over batches, from resampled batches."""
    if len(increases) < _FEWEST_BATCHES or not np.isfinite(increases).all():
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(increases), size=(_RESAMPLES, len(increases)))
    means = np.sum(increases[chosen] * counts[chosen], axis=1)
    means = means / np.sum(counts[chosen], axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
