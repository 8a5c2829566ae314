"""Networks trained by plain Keras and by `keras_nrs` with a delta of 0, side by side.

With eps = 0 and `normalize=True` Equation 3 is L(theta), so everything must come out
as in plain Keras.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

import keras_nrs
from keras_nrs import keras_internals
from tests.support.arrays import ROUNDING
from tests.support.asserts import numpy_values
from tests.support.keras_trainer import OWN_LOGS
from tests.support.replicas import devices

BATCH_SIZE = 8
NUM_SAMPLES = 4 * BATCH_SIZE
CLASSES = 3
RATE = 0.05

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory_efficient": {"memory_efficient": True},
    "interval": {"interval": 2},
    "groups": {"perturbations_per_replica": 2},
    "fraction": {"perturbed_fraction": 0.5},
    "devices": {},
}
# Options with which the passes run on shares of a batch.
SHARES = frozenset({"groups", "fraction", "devices"})


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A model and its data.

    Attributes:
        make: A function that makes the compiled model.
        data: Inputs, labels, and sample weights if there are any.
        draws: Whether it draws random numbers.
        mixes: Whether the output of a sample depends on the rest of the batch.
        atol: Absolute tolerance of weights, states and logs.
        options: The options with which it is trained.
    """

    make: Callable[[], keras.Model]
    data: tuple[Any, ...]
    draws: bool = False
    mixes: bool = False
    atol: float = 1e-6
    options: tuple[str, ...] = tuple(OPTIONS)


def classes(num: int = NUM_SAMPLES) -> np.ndarray:
    return (np.arange(num) * 7 % 5 % CLASSES).astype("int32")


def normal(*shape: int) -> np.ndarray:
    """The same numbers for the same shape."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(NUM_SAMPLES, *shape)).astype("float32")


def integers(*shape: int, high: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, high, (NUM_SAMPLES, *shape)).astype("int32")


def compiled(model: keras.Model, **kwargs: Any) -> keras.Model:
    """The model, compiled as a classifier with logits unless told otherwise."""
    defaults = {
        # Adam would turn roundings into whole steps.
        "optimizer": keras.optimizers.SGD(RATE),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }
    model.compile(**(defaults | kwargs))
    return model


def repeated(data: tuple[Any, ...]) -> tuple[Any, ...]:
    """Batches of one sample each, of which any share is like the whole."""
    return keras.tree.map_structure(
        lambda a: np.repeat(a[::BATCH_SIZE], BATCH_SIZE, axis=0), data
    )


class Setting(NamedTuple):
    """Where plain Keras minimizes the same loss as a wrapped model."""

    repeats: bool
    num_devices: int

    @classmethod
    def of(cls, network: Network, option: str) -> "Setting":
        """The perturbed loss of a fraction is another than that of the batch.

        So is any loss on a share of a batch in which samples depend on each other.
        """
        repeats = option == "fraction" or (network.mixes and option in SHARES)
        return cls(repeats, 2 if option == "devices" else 1)


Outcome = dict[str, np.ndarray]


def outcome(
    network: Network, setting: Setting, wrapped: dict[str, Any] | None = None
) -> Outcome:
    """Weights and states after three epochs, and logs, with all metrics, by name.

    Args:
        network: The network.
        setting: The data and devices.
        wrapped: Options of `wrap()`. `None` for plain Keras.
    """
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    data = repeated(network.data) if setting.repeats else network.data
    arguments = keras.tree.map_structure(np.copy, data)
    several = setting.num_devices > 1
    with devices(setting.num_devices) if several else nullcontext():
        trained = model = network.make()
        if wrapped is not None:
            trained = keras_nrs.wrap(model, eps=0.0, normalize=True, seed=0, **wrapped)
        history = trained.fit(
            *arguments[:2],
            sample_weight=arguments[2] if len(arguments) == 3 else None,
            batch_size=BATCH_SIZE,
            epochs=3,
            shuffle=False,
            verbose=0,
        ).history
    variables = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
        *untracked_variables(model),
    ]
    found = {name: np.array(log) for name, log in history.items()}
    for i, value in enumerate(numpy_values(variables)):
        found[f"{i} {variables[i].name}"] = value
    return found


@functools.cache
def in_keras(network: Network, setting: Setting) -> Outcome:
    return outcome(network, setting)


def untracked_variables(model: keras.Model) -> list[keras.Variable]:
    """The variables of layers that Keras does not know."""
    layers = keras_internals.sublayers(model, recursive=True)
    return [layer.untracked.variable for layer in layers if hasattr(layer, "untracked")]


def assert_no_divergence(found: Outcome) -> None:
    """Both passes make the same draws."""
    # Outputs of order one, whose products are rounded some ten times.
    np.testing.assert_allclose(found["model_divergence"], 0, atol=10 * ROUNDING)


def assert_equal_but_rounded(found: Outcome, expected: Outcome, *, atol: float) -> None:
    assert set(found) - OWN_LOGS == set(expected)
    for name, value in expected.items():
        # 12 steps, each of which rounds the sum of two equal gradients once more.
        np.testing.assert_allclose(
            found[name], value, rtol=1e-5, atol=atol, err_msg=name
        )


def assert_only_counters_are_equal(found: Outcome, expected: Outcome) -> None:
    """Steps and the states of seeds are equal, weights are not."""
    assert set(found) - OWN_LOGS == set(expected)
    assert not np.allclose(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
    for name, value in expected.items():
        if not np.issubdtype(value.dtype, np.floating):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
