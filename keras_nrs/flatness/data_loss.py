"""The loss over a whole data set, at any values of the weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import stateless
from keras_nrs.backend import compile_function
from keras_nrs.backend import gradient_with
from keras_nrs.backend import restored_random_state
from keras_nrs.batch_norm import measured_state
from keras_nrs.batches import Batches
from keras_nrs.flatness.loss import BatchLoss
from keras_nrs.flatness.loss import Inputs
from keras_nrs.flatness.loss import full_precision

Array = NDArray[Any]
Tensor = Any
# Values of all trainable variables, and of all others.
Values = tuple[list[Tensor], list[Tensor]]


class DataLoss:
    """The loss of a data set in inference mode, as `evaluate()` reports it.

    Args:
        model: A compiled model, which must not be wrapped.
        batches: The data.
        regularizers: Whether losses of layers count.
        variables: The trainable variables in which to differentiate. Defaults to all.
        moments_of: Batches on which BatchNorm's moments are measured again at each
            point. Defaults to none: the given values of the state count.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        *,
        regularizers: bool,
        variables: Sequence[keras.Variable] | None = None,
        moments_of: Batches | None = None,
    ) -> None:
        chosen = model.trainable_variables if variables is None else list(variables)
        self._model = model
        self._batches = batches
        self._moments_of = moments_of

        def make() -> tuple[BatchLoss, Any, Any]:
            loss = BatchLoss(
                model,
                chosen,
                regularizers=regularizers,
                first_batch=next(iter(batches)),
            )

            def with_gradient(weights: list[Tensor], inputs: Inputs) -> Any:
                def twice(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
                    value = loss(weights, inputs)
                    return value, ops.stop_gradient(value)

                return gradient_with(twice, weights)

            return loss, compile_function(loss), compile_function(with_gradient)

        key = DataLoss, regularizers, *(id(v) for v in chosen)
        made = stateless.cached_on_model(model, key, make)
        self._loss, self._compiled, self._with_gradient = made

    def by_batch(self, *points: Values) -> tuple[Array, Array]:
        """The losses of each batch, a row for each point, and numbers of samples.

        In one pass, so that the losses of a column are those of the same samples: the
        next pass may have them in another order.
        """
        measured = [self._measured(values) for values in points]
        counts: list[int] = []
        losses: list[list[float]] = [[] for _ in points]
        # Each pass makes the same draws, should the model make any.
        with restored_random_state(points[0][0][0]):
            for batch in self._batches:
                counts.append(batch.num_samples)
                for of_point, (weights, state) in zip(losses, measured, strict=True):
                    selected = self._loss.selected(weights)
                    # All points have the draws from which the next batch's go on.
                    is_last = of_point is losses[-1]
                    with (
                        nullcontext() if is_last else restored_random_state(weights[0])
                    ):
                        value = self._compiled(selected, Inputs(batch, weights, state))
                    of_point.append(stateless.as_float(value))
        return np.array(losses), np.array(counts)

    def __call__(self, values: Values) -> float:
        """The mean over the batches, weighted by their numbers of samples."""
        (losses,), counts = self.by_batch(values)
        return float(np.sum(losses * counts) / np.sum(counts))

    def with_gradient(self, values: Values) -> tuple[float, list[Array]]:
        """The loss, and its gradient in each of the chosen variables."""
        weights, state = self._measured(values)
        selected = self._loss.selected(weights)
        total, count = 0.0, 0
        gradients = [np.zeros(tuple(w.shape)) for w in selected]
        with restored_random_state(weights[0]):
            for batch in self._batches:
                inputs = Inputs(batch, weights, state)
                of_batch, value = self._with_gradient(selected, inputs)
                n = batch.num_samples
                total += n * stateless.as_float(value)
                count += n
                for sums, part in zip(gradients, of_batch, strict=True):
                    sums += n * ops.convert_to_numpy(part).astype("float64")
        return total / count, [sums / count for sums in gradients]

    def _measured(self, values: Values) -> Values:
        if self._moments_of is None:
            return values
        weights, state = values
        with full_precision(self._model):
            state = measured_state(self._model, self._moments_of, weights, state)
        return weights, state


def to_tensors(arrays: Sequence[Array], like: Sequence[Tensor]) -> list[Tensor]:
    """The arrays as tensors in the dtypes of other tensors."""
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in like]
    pairs = zip(arrays, dtypes, strict=True)
    return [ops.convert_to_tensor(np.asarray(a), dtype) for a, dtype in pairs]


def moments_batches(model: Any, data: Any, batch_size: int) -> Batches | None:
    """Batches on which BatchNorm's moments are measured, `None` for no data."""
    return None if data is None else Batches(model, data, batch_size=batch_size)
