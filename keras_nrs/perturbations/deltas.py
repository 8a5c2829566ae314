"""The deltas of a model's variables, and adding them."""

import inspect
from collections.abc import Container
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_nrs.embeddings import PerturbedTable
from keras_nrs.perturbations.perturbation import Perturbation
from keras_nrs.perturbations.random_noise import common_dtype
from keras_nrs.perturbations.row_noise import RowDelta
from keras_nrs.stateless import cached_on_model
from keras_nrs.unit_axes import unit_axes

Tensor = Any


def sample_deltas(
    perturbation: Perturbation,
    model: Any,
    values: Sequence[Tensor],
    eps: Tensor,
    rng: Any,
    gradients: Sequence[Tensor] | None = None,
    tables: Container[int] = (),
) -> list[Any]:
    """One delta for each trainable variable, `None` for one that is not perturbed.

    Args:
        perturbation: How delta is drawn.
        model: A built model, which must not be wrapped.
        values: Values of its trainable variables.
        eps: Size of the neighborhood.
        rng: A source of random tensors.
        gradients: The gradient of the loss in these values, if it is known.
        tables: The `id` of each variable that is a table of which few rows are read. It
            gets a `RowDelta` from a perturbation that can draw one.

    Raises:
        ValueError: if no variable is selected, or the deltas do not fit the weights, or
            if the perturbation needs a gradient that is not known.
    """
    variables = model.trainable_variables
    selected = [
        i
        for i, v in enumerate(variables)
        # float8's scales are statistics of the batch, not weights.
        if not v.overwrite_with_gradient and perturbation.selects(v)
    ]
    deltas: list[Any] = [None] * len(variables)
    if not variables:
        return deltas
    if not selected:
        paths = [v.path for v in variables]
        raise ValueError(
            "`where` must select at least one trainable variable. Received: "
            f"where={perturbation.where!r}, which selects none of "
            f"{paths if len(paths) < 10 else [*paths[:9], '...']}."
        )
    needed: dict[str, Sequence[Any]] = {}
    if perturbation.needs_units:
        needed["units"] = cached_on_model(model, unit_axes, lambda: unit_axes(model))
    if perturbation.needs_gradients:
        if gradients is None:
            raise ValueError(
                "`perturbation` must not need the gradient of a loss here. Received: "
                f"perturbation={type(perturbation).__name__}. Use a random one, such "
                "as perturbation='relative'."
            )
        needed["gradients"] = gradients
    are_tables = [id(v) in tables for v in variables]
    if (
        any(are_tables)
        and "tables" in inspect.signature(perturbation.sample).parameters
    ):
        needed["tables"] = are_tables
    sampled = perturbation.sample(
        [values[i] for i in selected],
        eps,
        rng,
        **{name: [of_all[i] for i in selected] for name, of_all in needed.items()},
    )
    name = f"{type(perturbation).__name__}.sample()"
    if not isinstance(sampled, list | tuple) or len(sampled) != len(selected):
        count = len(sampled) if isinstance(sampled, list | tuple) else "no list of"
        raise ValueError(
            f"{name} must return a list with one tensor for each weight. Received: "
            f"{count} tensors for {len(selected)} weights."
        )
    for i, delta in zip(selected, sampled, strict=True):
        shape = tuple(getattr(delta, "shape", ("no tensor",)))
        if shape != tuple(values[i].shape):
            raise ValueError(
                f"{name} must return tensors of the weights' shapes. Received: shape "
                f"{shape} for {variables[i].path} of shape {tuple(values[i].shape)}."
            )
        if not isinstance(delta, RowDelta):
            delta = ops.stop_gradient(ops.convert_to_tensor(delta))
        deltas[i] = delta
    return deltas


def add_deltas(values: Sequence[Tensor], deltas: Sequence[Any]) -> list[Any]:
    """theta + delta in the dtype of theta.

    Those of different dtypes are added in float32 or float64.

    It is a `PerturbedTable` for a `RowDelta`.
    """
    return [
        value if delta is None else _moved(value, delta)
        for value, delta in zip(values, deltas, strict=True)
    ]


def _moved(value: Tensor, delta: Any) -> Any:
    if isinstance(delta, RowDelta):
        return PerturbedTable(
            value, lambda rows, indices: _add_delta(rows, delta.of(rows, indices))
        )
    return _add_delta(value, delta)


def _add_delta(value: Tensor, delta: Tensor) -> Tensor:
    if value.dtype == delta.dtype:  # Eager operations that do nothing take time, too.
        return value + delta
    dtype = common_dtype([value, delta])
    return ops.cast(ops.cast(value, dtype) + ops.cast(delta, dtype), value.dtype)
