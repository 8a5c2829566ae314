"""The base class of perturbations."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_nrs.unit_axes import is_kernel

Tensor = Any
Where = str | Callable[[Any], bool] | None

# The predicates that `where` may name.
_PREDICATES = {"kernels": is_kernel}


class Perturbation:
    """Base class of the distributions of delta.

    At every step an `NRSModel` calls `sample()` with the trainable weights, and adds
    the result to them for the perturbed pass. delta is a constant of the step: no
    gradient flows through it.

    To make your own, subclass this and implement `sample()`. To save the model, add
    `get_config()` and `@keras.saving.register_keras_serializable()`. A subclass with
    `needs_units = True` gets one more argument: `sample(weights, eps, rng, units=...)`;
    so does one with `needs_gradients = True`.

    Args:
        where: Selects the perturbed variables. `None`: all. `"kernels"`: all but biases
            and the scales and offsets of normalization. Or a predicate of a
            `keras.Variable`; to save the model, use a function that is registered with
            Keras, not a lambda. Non-trainable and integer variables are never
            perturbed.

    Attributes:
        needs_units: Whether `sample()` takes `units`, a tuple of axes for each weight,
            along which its output units lie: `keras_nrs.unit_axes.unit_axes`.
        needs_gradients: Whether `sample()` takes `gradients`: a list with a tensor of
            the shape of each weight, the gradient at theta of the loss of the samples
            that share this delta, without weight penalties. It is that of
            `compile(loss=...)` and `add_loss()` on these samples alone, on as many
            devices as there are: neither the optimizer's loss scale nor the number of
            replicas is in it. With `sync_perturbation` it is the mean over the groups
            of samples. It may be infinite or NaN where a scaled loss overflows.

    Raises:
        ValueError, TypeError: if `where` is not as described.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Section 3.3.

    Example:

    ```python
    class Uphill(keras_nrs.perturbations.Perturbation):
        def sample(self, weights, eps, rng):
            return [eps * keras.ops.sign(w) for w in weights]

    model = keras_nrs.wrap(model, eps=0.05, perturbation=Uphill())
    ```
    """

    needs_units = False
    needs_gradients = False
    # A default for subclasses that do not call `super().__init__()`.
    where: Where = None

    def __init__(self, *, where: Where = None) -> None:
        is_name = isinstance(where, str)
        is_allowed = where in _PREDICATES if is_name else callable(where)
        if where is not None and not is_allowed:
            raise (ValueError if is_name else TypeError)(
                "`where` must be None, 'kernels' or a predicate of a variable. "
                f"Received: where={where!r}. For example: "
                "where=lambda v: 'kernel' in v.path"
            )
        self.where = where

    def sample(self, weights: Sequence[Any], eps: Tensor, rng: Any) -> list[Tensor]:
        """Draw one delta.

        Args:
            weights: Float tensors or variables, the perturbed ones.
            eps: Scalar, the size of the neighborhood.
            rng: A source of random tensors, with `rng.normal(shape)`,
                `rng.rademacher(shape)` and `rng.uniform(shape)`. Calls at one step
                return independent numbers, and a repeated step returns the same ones.
                The built-in classes also take an `int` or a
                `keras.random.SeedGenerator`.

        Returns:
            A list of tensors with the shapes of `weights`, in float64 if any weight has
            it, otherwise in float32.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement sample(weights, eps, rng)."
        )

    def selects(self, variable: Any) -> bool:
        """Whether a trainable variable is perturbed."""
        if not keras.backend.is_float_dtype(variable.dtype):
            return False
        where = self.where
        predicate = _PREDICATES[where] if isinstance(where, str) else where
        return predicate is None or bool(predicate(variable))

    def get_config(self) -> dict[str, Any]:
        own = type(self)
        has_own_init = own.__init__ is not Perturbation.__init__
        if has_own_init and own.get_config is Perturbation.get_config:
            raise NotImplementedError(
                f"{own.__name__} has its own __init__(), so it must implement "
                "get_config() to be saved: return a dict of the arguments."
            )
        return {"where": self.where}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Perturbation":
        config = dict(config)
        if isinstance(config.get("where"), dict):
            config["where"] = keras.saving.deserialize_keras_object(config["where"])
        return cls(**config)
