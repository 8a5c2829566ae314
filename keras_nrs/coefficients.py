"""eps and alpha of a wrapped model: numbers, or schedules of the training steps."""

from collections.abc import Callable
from typing import Any
from typing import SupportsFloat

import keras
from keras import ops

from keras_nrs._checks import check_nonnegative
from keras_nrs.backend import compile_function

Tensor = Any
# A number or a scalar tensor, or a `LearningRateSchedule`: Keras is untyped.
Given = SupportsFloat | Callable[[Any], Any]


class Coefficient:
    """eps or alpha. Keras does not count its variable as a weight of the model.

    Args:
        name: The name of the argument.
        given: A number >= 0, or a `keras.optimizers.schedules.LearningRateSchedule`.

    Attributes:
        variable: The value in use, of the last step if there is a schedule.
        given: The number or the schedule that was given or assigned last.
        schedule: The schedule as a compiled function, `None` for a number. Each
            assigned schedule has another, so that programs can be told apart by it.
        is_paused: Whether steps are plain ones for now, whatever the value.
    """

    given: Given
    schedule: Callable[[Any], Tensor] | None
    is_paused = False

    def __init__(self, name: str, given: Given) -> None:
        self.name = name
        self.variable = keras.Variable(
            0.0,
            dtype="float64" if keras.config.floatx() == "float64" else "float32",
            trainable=False,
            autocast=False,
            # All replicas of TensorFlow assign the same value.
            aggregation="only_first_replica",
            name=name,
        )
        self.assign(given)

    def assign(self, given: Given) -> None:
        """Take a number or a schedule in place of what was given before.

        Raises:
            TypeError, ValueError: if it is neither, or not >= 0.
        """
        name = self.name
        if not isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
            if callable(given):
                raise TypeError(
                    f"`{name}` must be a number or a LearningRateSchedule of "
                    f"keras.optimizers.schedules. Received: {name}={given!r} of type "
                    f"{type(given).__name__}. Pass an instance of a subclass, whose "
                    "__call__(step) gives a number >= 0."
                )
            self.given = check_nonnegative(name, given)
            self.schedule = None
            self.variable.assign(self.given)
            return
        first = given(ops.convert_to_tensor(0, "int32"))
        self.variable.assign(check_nonnegative(f"{name}(0)", first))
        self.given = given
        dtype = self.variable.dtype

        def value(step: Tensor) -> Tensor:
            return ops.cast(given(ops.cast(step, "int32")), dtype)

        self.schedule = compile_function(value)

    def at(self, step: Any) -> Tensor:
        """The value in a training step, which is counted from 0."""
        return self.variable.value if self.schedule is None else self.schedule(step)
