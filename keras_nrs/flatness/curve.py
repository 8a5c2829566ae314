"""Curves in weight space between two models, along which the loss is low."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs.backend import compile_function
from keras_nrs.backend import gradient
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batches
from keras_nrs.flatness.data_loss import to_tensors
from keras_nrs.flatness.loss import BatchLoss
from keras_nrs.flatness.loss import Inputs
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.progress import Progress
from keras_nrs.keras_internals import is_random_state
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state

Array = NDArray[Any]
Tensor = Any


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quadratic Bezier curve in weight space, as `connect` returns it.

    Its weights at t are `(1 - t)**2 * start + 2 * t * (1 - t) * control + t**2 * end`.

    Attributes:
        start, control, end: Lists with an array for each trainable variable.
    """

    start: list[Array]
    control: list[Array]
    end: list[Array]

    @classmethod
    def line(cls, model: keras.Model, other: keras.Model) -> "Curve":
        """The straight line, whose control point is its middle."""
        start, end = _weights(model), _weights(other)
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        return cls(start=start, control=middle, end=end)

    def point(self, t: float) -> list[Array]:
        """The weights at t: 0 is the start, 1 the end."""
        parts = zip(self.start, self.control, self.end, strict=True)
        return [(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in parts]

    def points(self, num_points: int = 21) -> list[list[Array]]:
        """Weights at evenly spaced t from 0 to 1, for `trajectory()`."""
        num_points = check_int("num_points", num_points, minimum=2)
        return [self.point(t) for t in np.linspace(0, 1, num_points)]


def _weights(model: keras.Model) -> list[Array]:
    weights, _ = stateless.current_values(base_model(model, needs_loss=False))
    return [ops.convert_to_numpy(w).astype("float64") for w in weights]


def check_same_shapes(model: Any, other: Any) -> None:
    """Raise an error unless two models have variables of the same shapes."""
    shapes = [
        [
            (tuple(v.shape), v.trainable)
            for v in m.trainable_variables + m.non_trainable_variables
        ]
        for m in (model, other)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`other` must have variables of the same shapes as `model`. Received: "
            f"{len(shapes[1])} variables for {len(shapes[0])} of `model`, or variables "
            "of other shapes, or frozen ones. Make both models with the same function."
        )


def check_curve(curve: Any, line: Curve) -> Curve:
    """`curve` if it is one between the ends of a line, or an error."""
    shapes = [a.shape for a in line.control]
    is_curve = isinstance(curve, Curve)
    if not is_curve or any(
        [a.shape for a in part] != shapes
        for part in (curve.start, curve.control, curve.end)
    ):
        received = "one of other shapes" if is_curve else repr(curve)
        raise ValueError(
            "`curve` must be a Curve with an array for each trainable variable, as "
            f"connect(model, other, x, y) returns it. Received: {received}."
        )
    for name, end, of_line in (
        ("model", curve.start, line.start),
        ("other", curve.end, line.end),
    ):
        if not all(map(np.allclose, end, of_line)):
            raise ValueError(
                "`curve` must lead from `model` to `other`. Received: a curve with an "
                f"end that has not the weights of `{name}`. Were the models trained "
                "since, or exchanged? Make it anew: connect(model, other, x, y)"
            )
    return curve


def connect(  # noqa: PLR0913
    model: keras.Model,
    other: keras.Model,
    x: Any,
    y: Any = None,
    *,
    epochs: int = 10,
    optimizer: Any = "adam",
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> Curve:
    """A curve between two trained models along which the training loss is low.

    It trains the control point of a quadratic Bezier curve, from the middle of the
    straight line on, to minimize the mean of the loss along the curve: each batch is
    evaluated at a random t, in training mode. `interpolate(..., curve=curve)` measures
    the loss on it. The models stay as they are.

    Args:
        model: A built model, compiled with a loss, wrapped or not. Its loss is used.
        other: A model with variables of the same shapes, wrapped or not.
        x: Training inputs, or batches of inputs and labels, as in `hessian_operator`.
        y: Labels.
        epochs: Passes over the data, >= 1.
        optimizer: An optimizer of Keras or its name. A copy of it is used.
        regularizers: Whether the losses of layers count.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches in an epoch. Defaults to all.
        seed: Seed of t. Batches keep their order.
        verbose: 1 to show progress.

    Returns:
        A `Curve`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Garipov et al., 2018](https://arxiv.org/abs/1802.10026), Section 3.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> def make_model(weight):
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     model.compile(loss="mse")
    ...     model.set_weights([np.full((1, 1), weight), np.zeros(1)])
    ...     return model
    >>> x, y = np.ones((8, 1), "float32"), np.zeros((8, 1), "float32")
    >>> ends = make_model(1.0), make_model(3.0)
    >>> curve = keras_nrs.flatness.connect(*ends, x, y, epochs=5)
    >>> kernels = [kernel.item() for kernel, _ in curve.points(3)]
    >>> kernels[0], kernels[1] < 2, kernels[2]
    (1.0, True, 3.0)
    """
    model = base_model(model)
    other = base_model(other, needs_loss=False)
    check_same_shapes(model, other)
    epochs = check_int("epochs", epochs, minimum=1)
    check_bool("regularizers", regularizers)
    rng = np.random.default_rng(check_seed("seed", seed))
    optimizer = _copied(optimizer)
    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    line = Curve.line(model, other)
    training = _ControlTraining(
        model, line, optimizer, regularizers=regularizers, batches=batches
    )
    progress = Progress(verbose, epochs * len(batches) if verbose else None, "batch")
    with restored_random_state(ops.zeros(())), drawing_from(host_random_state()):
        for _ in range(epochs):
            for batch in batches:
                training.step(batch, float(rng.uniform()))
                progress.advance()
    progress.finish()
    return Curve(start=line.start, control=training.control(), end=line.end)


def _copied(optimizer: Any) -> keras.optimizers.Optimizer:
    """An optimizer that has no variables yet.

    Mixed precision puts a `LossScaleOptimizer` around the user's. The curve is trained
    in full precision, with the inner one: on JAX the outer one works in compiled steps
    alone.
    """
    found = keras.optimizers.get(optimizer)
    found = getattr(found, "inner_optimizer", found)
    return type(found).from_config(found.get_config())


class _ControlTraining:
    """The training of a curve's control point.

    Args:
        model: A compiled model, which must not be wrapped.
        line: The curve to begin with.
        optimizer: An optimizer without variables.
        regularizers: Whether losses of layers count.
        batches: The data.
    """

    def __init__(
        self,
        model: Any,
        line: Curve,
        optimizer: Any,
        *,
        regularizers: bool,
        batches: Batches,
    ) -> None:
        self._optimizer = optimizer
        self._weights, self._state = stateless.current_values(model)
        self._seeds = [is_random_state(v) for v in model.non_trainable_variables]
        self._ends = [
            to_tensors(part, self._weights) for part in (line.start, line.end)
        ]
        # Integers cannot be trained, and are the same in both models.
        self._trained = [
            i
            for i, v in enumerate(model.trainable_variables)
            if keras.backend.is_float_dtype(v.dtype)
        ]
        self._control = line.control
        self._variables = [
            keras.Variable(
                line.control[i], dtype=self._weights[i].dtype, name="control"
            )
            for i in self._trained
        ]
        loss = BatchLoss(
            model,
            [model.trainable_variables[i] for i in self._trained],
            regularizers=regularizers,
            first_batch=next(iter(batches)),
            training=True,
        )
        starts, ends = ([part[i] for i in self._trained] for part in self._ends)

        def gradients(control: list[Tensor], t: Tensor, inputs: Inputs) -> list[Tensor]:
            def loss_at(control: list[Tensor]) -> Tensor:
                parts = zip(starts, control, ends, strict=True)
                point = [_bezier(t, *part) for part in parts]
                return loss(point, inputs)

            return gradient(loss_at, control)

        self._gradients = compile_function(gradients)

    def step(self, batch: Any, t: float) -> None:
        """Move the control point by the gradient of one batch's loss at t."""
        values = [ops.convert_to_tensor(v.value) for v in self._variables]
        inputs = Inputs(batch, self._weights, self._state)
        found = self._gradients(values, ops.convert_to_tensor(t, "float32"), inputs)
        # As an optimizer with a `loss_scale_factor` expects them.
        scale = self._optimizer.scale_loss(ops.ones(()))
        self._optimizer.apply([scale * g for g in found], self._variables)
        # New masks of dropout at each step, as `SeedGenerator.next()` draws them.
        self._state = [
            value + ops.convert_to_tensor([0, 1], value.dtype) if is_seed else value
            for value, is_seed in zip(self._state, self._seeds, strict=True)
        ]

    def control(self) -> list[Array]:
        """The control point."""
        found = list(self._control)
        for i, variable in zip(self._trained, self._variables, strict=True):
            found[i] = ops.convert_to_numpy(variable).astype("float64")
        return found


def _bezier(t: Tensor, start: Tensor, control: Tensor, end: Tensor) -> Tensor:
    t = ops.cast(t, control.dtype)
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
