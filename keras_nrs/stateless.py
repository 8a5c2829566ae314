"""Calling a model with given values of its variables, which keep their own."""

import inspect
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import contextmanager
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_nrs import keras_internals
from keras_nrs.backend import unrepeatable_draws
from keras_nrs.embeddings import PerturbedTable
from keras_nrs.embeddings import looking_up_rows
from keras_nrs.embeddings import readers

Tensor = Any
# A variable and its value.
Update = tuple[keras.Variable, Tensor]

# Plain Keras assigns eagerly there, which a gradient does not pass.
ASSIGNMENT_STOPS_GRADIENTS = keras.config.backend() != "jax"
IS_EAGER = keras.config.backend() == "torch"


def call_kwargs(model: Any, *, training: bool | None) -> dict[str, Any]:
    """The keyword arguments of a call of `model`: `training`, if it takes that."""
    takes_training = "training" in inspect.signature(model.call).parameters
    return {"training": training} if takes_training else {}


def call(model: Any, x: Any, *, training: bool | None) -> Any:
    """The outputs of a model for inputs that stay as they are."""
    if IS_EAGER:  # A layer may change its input in place, as `RandomBrightness` does.
        x = keras.tree.map_structure(
            lambda t: ops.copy(t) if ops.is_tensor(t) else t, x
        )
    return model(x, **call_kwargs(model, training=training))


def current_values(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The values of a model's trainable and non-trainable variables, as tensors."""

    def values(variables: list[keras.Variable]) -> list[Tensor]:
        return [ops.stop_gradient(ops.convert_to_tensor(v.value)) for v in variables]

    return values(model.trainable_variables), values(model.non_trainable_variables)


class ModelVariables(NamedTuple):
    """The variables of a model. Keras walks all its layers to find them."""

    trainable: list[keras.Variable]
    non_trainable: list[keras.Variable]
    metrics: list[keras.Variable]

    @classmethod
    def of(cls, model: Any) -> "ModelVariables":
        """Those of a built model."""
        return cls(
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        )


class PassScope(keras.StatelessScope):  # type: ignore[misc]
    """A scope that remembers which variables were assigned in it.

    Args:
        mapping: Pairs of a variable and its value, a tensor or a `PerturbedTable`.
        readers: Layers that look up rows of such tables.

    Attributes:
        updates: Pairs of a variable and its last assigned value, by the variable's id.
        tables: The perturbed tables, by the variable's id.
    """

    def __init__(
        self, mapping: list[tuple[Any, Any]], readers: Sequence[keras.Layer] = ()
    ) -> None:
        self.tables = {
            id(variable): value
            for variable, value in mapping
            if isinstance(value, PerturbedTable)
        }
        values = [
            (variable, value.value if isinstance(value, PerturbedTable) else value)
            for variable, value in mapping
        ]
        super().__init__([] if IS_EAGER else values, collect_losses=True)
        if IS_EAGER:
            # They are tensors. To convert and check them takes a tenth of a step.
            self.state_mapping = {id(variable): value for variable, value in values}
        self.updates: dict[int, Update] = {}
        self._lookups = ExitStack()
        self._readers = readers

    def __enter__(self) -> "PassScope":
        self._lookups.enter_context(looking_up_rows(self._readers))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._lookups.close()

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        table = self.tables.get(id(variable))
        if table is not None:
            return table.whole()
        return super().get_current_value(variable)

    def add_update(self, update: Update) -> None:
        variable, value = update
        if ASSIGNMENT_STOPS_GRADIENTS:
            value = ops.stop_gradient(value)
            weight = self.get_current_value(variable)
            if variable.trainable and weight is not None:
                # Gradients reach the weight itself. Not in place: the memory is shared.
                value = value + (weight - ops.stop_gradient(weight))
        self.tables.pop(id(variable), None)
        super().add_update((variable, value))
        self.updates[id(variable)] = variable, value


def scope(
    model: Any,
    weights: Sequence[Any],
    state: Sequence[Tensor],
    metrics: Sequence[Tensor] | None = None,
    others: Sequence[Update] = (),
    *,
    variables: ModelVariables | None = None,
) -> PassScope:
    """A scope in which the variables of a model have the given values.

    Args:
        model: A built model.
        weights: Values of its trainable variables: tensors, or `PerturbedTable`s.
        state: Values of its non-trainable variables.
        metrics: Values of the variables of its metrics. By default these keep theirs.
        others: Values of any variables, which go before the other arguments.
        variables: Those of the model, if they are known.
    """
    if variables is None:
        variables = ModelVariables.of(model)
    mapping = [
        *zip(variables.trainable, weights, strict=True),
        *zip(variables.non_trainable, state, strict=True),
    ]
    if metrics is not None:
        mapping += zip(variables.metrics, metrics, strict=True)
    found: list[keras.Layer] = []
    if any(isinstance(value, PerturbedTable) for value in weights):
        found = [layer for of_table in readers(model).values() for layer in of_table]
    return PassScope([*mapping, *others], found)


def added_losses(model: Any, scope: PassScope) -> list[Tensor]:
    """The losses that layers added in a scope, without weight penalties: scalars.

    Keras takes the sum of the elements of a loss that is none.
    """
    added = set(map(id, scope.losses))
    return [ops.sum(loss) for loss in model.losses if id(loss) in added]


def check_draws(model: Any, x: Any, *, training: bool) -> None:
    """Raise an error for random numbers that no state of a model repeats.

    Two passes with other random numbers have other outputs without any perturbation.

    Args:
        model: A built model.
        x: Its inputs: tensors, of which shapes and dtypes count.
        training: Whether to call it in training mode.
    """

    def forward(x: Any) -> Any:
        with scope(model, *current_values(model)):
            return model(x, **call_kwargs(model, training=training))

    draws = cached_on_model(
        model, (check_draws, training), lambda: unrepeatable_draws(forward, x)
    )
    if draws:
        raise ValueError(
            "`model` must draw random numbers by keras.random, so that a second pass "
            f"can draw the same. Received: a model named {model.name!r} with the "
            f"operation {draws[0]!r}. Make self.seed_generator = keras.random."
            "SeedGenerator() in the layer, and draw with keras.random.normal(shape, "
            "seed=self.seed_generator) or the like."
        )


@contextmanager
def layer_losses(model: Any, losses: Sequence[Tensor]) -> Iterator[None]:
    """A context in which `compute_loss()` adds these losses, not the layers' own."""
    # An empty list would mean the layers' own.
    zero = ops.zeros((), keras.config.floatx())
    keras_internals.override_layer_losses(model, losses or [zero])
    try:
        yield
    finally:
        keras_internals.override_layer_losses(model, [])


def cached_on_model(model: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """The result of `make()`, made once for each model and key.

    It saves compiling a measurement again at every epoch. A model that was compiled
    again, or has other trainable weights, needs a new result.
    """
    cache = vars(model).get("_keras_nrs_cache")
    if cache is None:
        cache = {}
        # Keras would track a plain attribute as a part of the model.
        object.__setattr__(model, "_keras_nrs_cache", cache)
    trainable = tuple(map(id, model.trainable_variables))
    full_key = key, keras_internals.compiled_loss(model), trainable
    if full_key not in cache:
        cache[full_key] = make()
    return cache[full_key]


def as_float(scalar: Tensor) -> float:
    """The value of a scalar tensor.

    TensorFlow makes an array of one in bfloat16 only if it has an axis.
    """
    return float(ops.convert_to_numpy(ops.reshape(scalar, (1,)))[0])
