"""Running a model on given values of its variables, which keep their own."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

Tensor = Any


def call_kwargs(model: Any, *, training: bool | None) -> dict[str, Any]:
    """The keyword arguments with which to call a model: not all take `training`."""
    return {"training": training} if model._call_has_training_arg else {}


def current_values(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The values of a model's trainable and non-trainable variables, as tensors."""

    def values(variables: list[keras.Variable]) -> list[Tensor]:
        return [ops.stop_gradient(ops.convert_to_tensor(v.value)) for v in variables]

    return values(model.trainable_variables), values(model.non_trainable_variables)


def scope(
    model: Any,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    metrics: Sequence[Tensor] | None = None,
) -> keras.StatelessScope:
    """A scope in which a model has these values and keeps its own.

    Args:
        model: A built model.
        weights: Values of its trainable variables.
        state: Values of its non-trainable variables.
        metrics: Values of the variables of its metrics, if they matter.
    """
    variables = model.trainable_variables + model.non_trainable_variables
    values = [*weights, *state]
    if metrics is not None:
        variables += model.metrics_variables
        values += metrics
    return keras.StatelessScope(
        list(zip(variables, values, strict=True)), collect_losses=True
    )


@contextmanager
def layer_losses(model: Any, losses: Sequence[Tensor]) -> Iterator[None]:
    """Make `compute_loss()` add these losses instead of the layers' own."""
    zero = ops.zeros((), keras.config.floatx())
    model._losses_override = list(losses) or [zero]
    try:
        yield
    finally:
        model._losses_override = []


def cached_on_model(model: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make()` gives, made once for a model and a key.

    For functions that are compiled: measured again at every epoch, they would be
    compiled again. What `compile()` replaced belongs to the key.
    """
    kept = vars(model).get("_kept_by_keras_nrs")
    if kept is None:
        kept = {}
        # Past Keras, which would track it as a part of the model.
        object.__setattr__(model, "_kept_by_keras_nrs", kept)
    # As does which weights are trainable.
    trainable = tuple(map(id, model.trainable_variables))
    full_key = key, model._compile_loss, trainable
    if full_key not in kept:
        kept[full_key] = make()
    return kept[full_key]
