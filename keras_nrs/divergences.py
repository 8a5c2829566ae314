"""Divergences between the outputs of two models: Definition 2 of the paper."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive

Tensor = Any

# The largest number of axes of a NumPy array.
_MAX_AXES = 64


class Divergence(keras.losses.Loss):  # type: ignore[misc]
    """Base class of the divergences d(theta, theta + delta).

    A divergence is a `keras.losses.Loss` of the model's outputs and the perturbed
    model's outputs. `sample_weight`, masks and `reduction` act on it as on any loss,
    and gradients flow through both arguments.

    To make your own, subclass this and implement `call(outputs, perturbed_outputs)`.

    Args:
        reduction: As in `keras.losses.Loss`. Defaults to `"sum_over_batch_size"`.
            `divergence="auto"` takes the reduction of the compiled loss.
        name: Name of the divergence.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064),
    Definition 2.

    Example:

    ```python
    class SquaredLogitDistance(keras_nrs.divergences.Divergence):
        def call(self, outputs, perturbed_outputs):
            return keras.ops.mean((outputs - perturbed_outputs) ** 2, axis=-1)

    model = keras_nrs.wrap(model, divergence=SquaredLogitDistance())
    ```
    """

    def __init__(
        self, *, reduction: str = "sum_over_batch_size", name: str | None = None
    ) -> None:
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def __call__(
        self, outputs: Tensor, perturbed_outputs: Tensor, sample_weight: Any = None
    ) -> Tensor:
        if "RaggedTensor" in {type(t).__name__ for t in (outputs, perturbed_outputs)}:
            raise ValueError(
                "`outputs` must be dense tensors for a divergence. Received: a "
                "RaggedTensor. Let the model return outputs.to_tensor(), or train it "
                "with scheme='sam' or 'asam', which have no divergence."
            )
        shapes = [
            tuple(t.shape) if hasattr(t, "shape") else np.shape(t)
            for t in (outputs, perturbed_outputs)
        ]
        axis, rank = getattr(self, "axis", -1), len(shapes[0])
        has_axis = not isinstance(axis, int) or -rank <= axis < rank
        is_same = rank == len(shapes[1]) and all(
            None in sizes or len(set(sizes)) == 1 for sizes in zip(*shapes, strict=True)
        )
        if not is_same or not has_axis:
            raise ValueError(
                "`outputs` and `perturbed_outputs` must be tensors of the same shape "
                f"with an axis {axis}. Received: the shapes {shapes[0]} and "
                f"{shapes[1]}, for {type(self).__name__}."
            )
        return super().__call__(outputs, perturbed_outputs, sample_weight)

    def call(self, outputs: Tensor, perturbed_outputs: Tensor) -> Tensor:
        """The divergence of each sample, or of each position.

        Args:
            outputs: Tensor of shape `(batch_size, ...)`, the model's output.
            perturbed_outputs: Tensor of the same shape, the perturbed model's output.

        Returns:
            Tensor of shape `(batch_size, ...)` without the outputs' last axis.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement call(outputs, perturbed_outputs)."
        )


@keras.saving.register_keras_serializable(package="keras_nrs")
class CategoricalKL(Divergence):
    """KL(p || q) of the categorical distributions of two classifiers.

    Computed from log-softmax in float32, so that it is finite for logits of 1e4 and
    exactly zero for equal outputs. The outputs must be finite.

    Args:
        from_logits: Whether the outputs are logits rather than probabilities. Only
            probabilities are clipped, at `keras.config.epsilon()`.
        axis: The axis of the classes. Defaults to the last.
        reduction: As in `Divergence`.
        name: As in `Divergence`.

    Example:

    >>> import keras, keras_nrs
    >>> kl = keras_nrs.divergences.CategoricalKL(from_logits=True)
    >>> float(kl(keras.ops.array([[1.0, 2.0]]), keras.ops.array([[1.0, 2.0]])))
    0.0
    """

    def __init__(
        self,
        from_logits: bool = False,
        axis: int = -1,
        *,
        reduction: str = "sum_over_batch_size",
        name: str | None = "categorical_kl",
    ) -> None:
        super().__init__(reduction=reduction, name=name)
        self.from_logits = check_bool("from_logits", from_logits)
        self.axis = check_int("axis", axis, -_MAX_AXES, _MAX_AXES - 1)

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        if not self.from_logits:
            total = ops.sum(outputs, axis=self.axis, keepdims=True)
            outputs = ops.log(ops.clip(outputs / total, keras.config.epsilon(), 1.0))
        return ops.log_softmax(outputs, axis=self.axis)

    def call(self, outputs: Tensor, perturbed_outputs: Tensor) -> Tensor:
        log_p = self._log_probabilities(outputs)
        log_q = self._log_probabilities(perturbed_outputs)
        return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=self.axis)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "from_logits": self.from_logits,
            "axis": self.axis,
        }


@keras.saving.register_keras_serializable(package="keras_nrs")
class BernoulliKL(Divergence):
    """KL(p || q) of independent yes-or-no labels, for binary and multi-label models.

    The mean over `axis`, as in `keras.losses.BinaryCrossentropy`.

    Args:
        from_logits: Whether the outputs are logits rather than probabilities. Only
            probabilities are clipped, at `keras.config.epsilon()`.
        axis: The axis of the labels. Defaults to the last.
        reduction: As in `Divergence`.
        name: As in `Divergence`.

    Example:

    >>> import keras, keras_nrs
    >>> kl = keras_nrs.divergences.BernoulliKL(from_logits=True)
    >>> float(kl(keras.ops.array([[2.0]]), keras.ops.array([[2.0]])))
    0.0
    """

    def __init__(
        self,
        from_logits: bool = False,
        axis: int = -1,
        *,
        reduction: str = "sum_over_batch_size",
        name: str | None = "bernoulli_kl",
    ) -> None:
        super().__init__(reduction=reduction, name=name)
        self.from_logits = check_bool("from_logits", from_logits)
        self.axis = check_int("axis", axis, -_MAX_AXES, _MAX_AXES - 1)

    def _logits(self, outputs: Tensor) -> Tensor:
        if self.from_logits:
            return outputs
        epsilon = keras.config.epsilon()
        probabilities = ops.clip(outputs, epsilon, 1.0 - epsilon)
        return ops.log(probabilities) - ops.log1p(-probabilities)

    def call(self, outputs: Tensor, perturbed_outputs: Tensor) -> Tensor:
        p, q = self._logits(outputs), self._logits(perturbed_outputs)
        yes = ops.sigmoid(p) * (ops.log_sigmoid(p) - ops.log_sigmoid(q))
        no = ops.sigmoid(-p) * (ops.log_sigmoid(-p) - ops.log_sigmoid(-q))
        return ops.mean(yes + no, axis=self.axis)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "from_logits": self.from_logits,
            "axis": self.axis,
        }


@keras.saving.register_keras_serializable(package="keras_nrs")
class GaussianKL(Divergence):
    """KL of two normal distributions of equal variance, for regression models.

    The mean of `(f - f') ** 2 / (2 * stddev ** 2)` over the last axis, as in
    `keras.losses.MeanSquaredError`.

    Args:
        stddev: Standard deviation of the targets around the output, in the unit of
            the targets, > 0. Defaults to 1.
        reduction: As in `Divergence`.
        name: As in `Divergence`.

    Example:

    >>> import keras, keras_nrs
    >>> kl = keras_nrs.divergences.GaussianKL(stddev=0.5)
    >>> float(kl(keras.ops.array([[1.0]]), keras.ops.array([[2.0]])))
    2.0
    """

    def __init__(
        self,
        stddev: float = 1.0,
        *,
        reduction: str = "sum_over_batch_size",
        name: str | None = "gaussian_kl",
    ) -> None:
        super().__init__(reduction=reduction, name=name)
        self.stddev = check_positive("stddev", stddev)

    def call(self, outputs: Tensor, perturbed_outputs: Tensor) -> Tensor:
        squares = ops.square((outputs - perturbed_outputs) / self.stddev)
        return 0.5 * ops.mean(squares, axis=-1)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"stddev": self.stddev}
