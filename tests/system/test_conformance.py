"""Across modules: layers and models train as in plain Keras, with every option."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest

from tests.support.conformance import OPTIONS
from tests.support.conformance import SHARES
from tests.support.conformance import Network
from tests.support.conformance import Setting
from tests.support.conformance import assert_equal_but_rounded
from tests.support.conformance import assert_no_divergence
from tests.support.conformance import assert_only_counters_are_equal
from tests.support.conformance import in_keras
from tests.support.conformance import outcome
from tests.support.conformance_layers import LAYERS
from tests.support.conformance_models import MODELS
from tests.support.matrix import rest

BACKEND = keras.config.backend()
NETWORKS = LAYERS | MODELS

Check = Callable[[Network, str], None]


def conforms(network: Network, option: str) -> None:
    setting = Setting.of(network, option)
    found = outcome(network, setting, OPTIONS[option])
    assert_equal_but_rounded(found, in_keras(network, setting), atol=network.atol)
    assert_no_divergence(found)


def differs(network: Network, option: str) -> None:
    """As the named reason says; but both passes are equal."""
    setting = Setting.of(network, option)
    found = outcome(network, setting, OPTIONS[option])
    assert_only_counters_are_equal(found, in_keras(network, setting))
    assert_no_divergence(found)


def only_accuracies_differ(network: Network, option: str) -> None:
    setting = Setting.of(network, option)
    found = outcome(network, setting, OPTIONS[option])
    expected = dict(in_keras(network, setting))
    assert not np.allclose(found.pop("accuracy"), expected.pop("accuracy"))
    assert_equal_but_rounded(found, expected, atol=network.atol)
    assert_no_divergence(found)


def fails(match: str, network: Network, option: str) -> None:
    with pytest.raises(ValueError, match=match):
        outcome(network, Setting.of(network, option), OPTIONS[option])


def fails_in_keras(
    error: type[Exception], match: str, network: Network, option: str
) -> None:
    with pytest.raises(error, match=match):
        outcome(network, Setting.of(network, option))


class Reason(NamedTuple):
    """The cause why some networks, with some options, do not train as plain Keras.

    Attributes:
        text: The reason.
        names: The networks.
        options: The options.
        check: A test of the reason.
        backends: The backends.
    """

    text: str
    names: set[str]
    options: frozenset[str]
    check: Check
    backends: tuple[str, ...] = ("jax", "tensorflow", "torch")

    def holds_for(self, name: str, option: str) -> bool:
        is_here = BACKEND in self.backends
        return is_here and name in self.names and option in self.options


DRAWING = {name for name, network in NETWORKS.items() if network.draws}
ALL = frozenset(OPTIONS)
# The first that holds counts.
REASONS = [
    Reason(
        "no second pass can repeat the draws of TensorFlow itself",
        {"RawNoise", "variational autoencoder of raw draws"},
        ALL,
        functools.partial(fails, r"must draw random numbers by keras\.random"),
        ("tensorflow",),
    ),
    Reason(
        "plain Keras gives a stateful layer the batch of one replica",
        {"stateful LSTM"},
        frozenset({"devices"}),
        functools.partial(fails_in_keras, ValueError, "If an RNN is stateful"),
        ("tensorflow",),
    ),
    Reason(
        "plain Keras makes its global generator on one replica",
        {"UnseededNoise"},
        frozenset({"devices"}),
        functools.partial(fails_in_keras, ValueError, "only supports singleton"),
        ("tensorflow",),
    ),
    Reason(
        "a stateful layer holds a whole batch",
        {"stateful LSTM"},
        SHARES,
        functools.partial(fails, "stateful layer 'lstm', which holds a whole batch"),
    ),
    Reason(
        "plain Keras changes a state in place that its gradient needs",
        {"stateful LSTM"},
        ALL,
        functools.partial(fails_in_keras, RuntimeError, "modified by an inplace"),
        ("torch",),
    ),
    Reason(
        "plain Keras draws from no global generator in a compiled program",
        {"UnseededNoise"},
        ALL,
        functools.partial(fails_in_keras, ValueError, "only use seeded random ops"),
        ("jax",),
    ),
    Reason(
        "plain Keras loses the masks of outputs on their way to its metrics",
        {"tagger"},
        ALL,
        only_accuracies_differ,
        ("jax",),
    ),
    Reason(
        "plain Keras calls TensorFlow in a compiled program",
        {"IntegerLookup", "RandomElasticTransform"},
        ALL,
        functools.partial(fails_in_keras, Exception, "automatically build|_error_repr"),
        ("jax",),
    ),
    Reason(
        "plain Keras updates no metric in call() in a compiled program",
        {"Measuring"},
        ALL,
        functools.partial(fails_in_keras, TypeError, "'NoneType' object is not call"),
        ("jax",),
    ),
    Reason(
        "shares have draws of their own",
        # Draws of PyTorch's own generator are the same, however a batch is split.
        DRAWING - ({"unseeded Dropout"} if BACKEND == "torch" else set()),
        SHARES,
        differs,
    ),
    Reason(
        "the samples of a fraction draw in another order",
        {"unseeded Dropout"},
        frozenset({"fraction"}),
        differs,
        ("torch",),
    ),
]


def reason_for(name: str, option: str) -> Reason | None:
    return next((r for r in REASONS if r.holds_for(name, option)), None)


# What the gate tests where steps are compiled.
GATE = {
    "plain": {"BatchNormalization", "variational autoencoder"},
    "memory_efficient": {"Dropout"},
    "interval": {"two outputs"},
    "groups": {"Counting"},
    "fraction": {"sample weights"},
    "devices": set(),
}


def is_slow(name: str, option: str) -> bool:
    is_quick = BACKEND == "torch" and option == "plain"
    return not is_quick and name not in GATE[option]


PAIRS = [
    pytest.param(
        name,
        option,
        id=f"{name}-{option}",
        marks=[pytest.mark.slow] if is_slow(name, option) else [],
    )
    for name, network in NETWORKS.items()
    for option in network.options
    if option != "devices" or BACKEND != "torch"
]


# Each has a state, draws, several outputs or losses of layers.
IN_ONE_PASS = [
    "variational autoencoder",
    *rest(
        "BatchNormalization",
        "RunningMean",
        "Counting",
        "unseeded Dropout",
        "two outputs",
        "sample weights",
        "recommender",
    ),
]


@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_one_pass_of_rpr_is_the_pass_of_plain_keras(name: str) -> None:
    network = NETWORKS[name]
    setting = Setting.of(network, "plain")
    found = outcome(network, setting, {"scheme": "rpr"})
    assert_equal_but_rounded(found, in_keras(network, setting), atol=network.atol)
    assert "model_divergence" not in found


# As Keras does on PyTorch.
@pytest.mark.filterwarnings("ignore:.*Tensor.T is deprecated on 0-D tensors")
# Keras's MixUp asks JAX for integers of 64 bits.
@pytest.mark.filterwarnings("ignore:.*Explicitly requested dtype int64")
@pytest.mark.parametrize(("name", "option"), PAIRS)
def test_as_in_plain_keras(name: str, option: str) -> None:
    reason = reason_for(name, option)
    check = reason.check if reason else conforms
    check(NETWORKS[name], option)
