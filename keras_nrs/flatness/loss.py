"""The loss and the divergence of a batch as functions of the selected weights."""

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batch
from keras_nrs.labels import naming_labels
from keras_nrs.nrs_model import NRSModel
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import copied_weights
from keras_nrs.step.output_divergences import total_divergence

Tensor = Any


class Inputs(NamedTuple):
    """All arguments of a batch's loss but the selected weights.

    Attributes:
        batch: The data.
        weights: Values of all trainable variables; the selected weights replace theirs.
        state: Values of the non-trainable variables.
    """

    batch: Batch
    weights: list[Tensor]
    state: list[Tensor]


def base_model(model: Any, *, needs_loss: bool = True) -> keras.Model:
    """The user's own model, or an error if it cannot be measured."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    if isinstance(model, NRSModel):
        model = model.base_model
    if not model.trainable_variables:
        raise ValueError(
            "`model` must be built and have trainable weights. Received: a model "
            f"named {model.name!r} without any. Call it on a batch of data first."
        )
    if needs_loss and keras_internals.compiled_loss(model) is None:
        raise ValueError(
            "`model` must be compiled with a loss, whose curvature is measured. "
            f"Received: a model named {model.name!r} without a loss. Call compile(loss="
            "...) first."
        )
    return model


def divergence_in_use(model: Any) -> ChosenDivergences:
    """The divergence of a wrapped model, and `"auto"` for other models."""
    if isinstance(model, NRSModel):
        return model.divergence_in_use()
    return ChosenDivergences("auto")


@contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """A context in which layers compute in the dtype of their variables.

    In half precision a second derivative is mostly rounding errors.
    """
    changed = []
    for layer in [model, *keras_internals.sublayers(model, recursive=True)]:
        policy = layer.dtype_policy
        is_quantized = policy.quantization_mode is not None
        if policy.compute_dtype != policy.variable_dtype and not is_quantized:
            changed.append((layer, policy))
            layer.dtype_policy = keras.DTypePolicy(policy.variable_dtype)
    try:
        yield
    finally:
        for layer, policy in changed:
            layer.dtype_policy = policy


class BatchLoss:
    """The loss of a batch as a pure function of the selected weights.

    In inference mode by default, and in the dtype of the weights. The loss of a data
    set is the mean over its batches, weighted by their numbers of samples, as in
    `evaluate()`.

    Args:
        model: A compiled model, which must not be wrapped.
        variables: The selected variables.
        regularizers: Whether losses of layers count.
        first_batch: A batch, to build the compiled loss if `compile()` did not.
        training: Whether layers are in training mode.
    """

    def __init__(
        self,
        model: Any,
        variables: Sequence[keras.Variable],
        *,
        regularizers: bool,
        first_batch: Batch,
        training: bool = False,
    ) -> None:
        self._training = training
        self.model = model
        self.variables = list(variables)
        self.regularizers = regularizers
        ids = [id(v) for v in variables]
        self._positions = [
            ids.index(id(v)) if id(v) in ids else None
            for v in model.trainable_variables
        ]
        self._build_loss(first_batch)

    def _build_loss(self, first_batch: Batch) -> None:
        if not keras_internals.compiled_loss(self.model).built:
            outputs = getattr(self.model, "outputs", None)
            with naming_labels(first_batch.y, outputs, first_batch.sample_weight):
                keras_internals.build_for_batch(self.model, tuple(first_batch))

    def selected(self, items: Sequence[Any]) -> list[Any]:
        """The items of the selected variables, of one item for each trainable one."""
        pairs = zip(self._positions, items, strict=True)
        return [item for position, item in pairs if position is not None]

    def _all_weights(self, weights: list[Tensor], inputs: Inputs) -> list[Tensor]:
        return [
            given if position is None else weights[position]
            for position, given in zip(self._positions, inputs.weights, strict=True)
        ]

    def __call__(self, weights: list[Tensor], inputs: Inputs) -> Tensor:
        """The compiled loss of one batch, a scalar.

        Args:
            weights: Tensors, values of the selected variables.
            inputs: All other arguments.
        """
        model, batch = self.model, inputs.batch
        values = self._all_weights(weights, inputs)
        with (
            full_precision(model),
            keras_internals.losses_of_one_replica(),
            stateless.scope(model, values, inputs.state),
        ):
            kwargs = stateless.call_kwargs(model, training=self._training)
            y_pred = model(batch.x, **kwargs)
            losses = model.losses if self.regularizers else []
            with (
                naming_labels(batch.y, y_pred, batch.sample_weight),
                stateless.layer_losses(model, losses),
            ):
                return keras_internals.compute_loss(
                    model,
                    batch.x,
                    batch.y,
                    y_pred,
                    copied_weights(batch.sample_weight),
                    training=self._training,
                )


class BatchDivergence(BatchLoss):
    """d(theta, theta') on a batch as a function of the selected weights in theta'.

    Its Hessian at theta' = theta is the Fisher information of the outputs.
    """

    def __init__(
        self,
        model: Any,
        variables: Sequence[keras.Variable],
        *,
        first_batch: Batch,
        divergence: ChosenDivergences,
    ) -> None:
        super().__init__(model, variables, regularizers=False, first_batch=first_batch)
        self._divergences = divergence
        if divergence.resolved is None:
            inputs = Inputs(first_batch, *stateless.current_values(self.model))
            outputs = self._call_model(inputs.weights, inputs)
            divergence.of(self.model, outputs, first_batch.y)

    def _build_loss(self, first_batch: Batch) -> None:
        """Nothing: there may be no labels."""

    def _call_model(self, values: list[Tensor], inputs: Inputs) -> Any:
        model, x = self.model, inputs.batch.x
        with full_precision(model), stateless.scope(model, values, inputs.state):
            return model(x, **stateless.call_kwargs(model, training=False))

    def __call__(self, weights: list[Tensor], inputs: Inputs) -> Tensor:
        values = self._all_weights(weights, inputs)
        # Both passes make the same draws, should the model make any.
        with restored_random_state(values[0]):
            clean = keras.tree.map_structure(
                ops.stop_gradient, self._call_model(inputs.weights, inputs)
            )
        perturbed = self._call_model(values, inputs)
        with keras_internals.losses_of_one_replica():
            return total_divergence(
                self._divergences.resolved or [],
                inputs.batch.y,
                clean,
                perturbed,
                inputs.batch.sample_weight,
            )
