"""The options of a step: one list for `wrap()`, `NRSModel`, configs and signatures."""

import inspect
from typing import Any

import keras
import pytest

import keras_nrs
from keras_nrs.perturbations import AdaptiveAscent
from keras_nrs.perturbations import Ascent
from keras_nrs.perturbations import RelativeBall
from keras_nrs.step.options import OPTION_NAMES
from keras_nrs.step.options import StepArguments
from keras_nrs.step.options import StepOptions

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_type_checkers_see_the_same_options() -> None:
    assert list(StepArguments.__annotations__) == list(OPTION_NAMES)


@pytest.mark.parametrize("function", [keras_nrs.wrap, keras_nrs.NRSModel])
def test_signatures_name_every_option(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert set(OPTION_NAMES) < set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert parameters["beta"].default == 1.0


def test_options_are_checked_and_frozen() -> None:
    options = StepOptions.from_arguments({"perturbation": "relative", "interval": 3})
    assert isinstance(options.perturbation, RelativeBall)
    for scheme, kind, eps in (
        ("nrs", RelativeBall, 0.2),
        ("sam", Ascent, 0.05),
        ("asam", AdaptiveAscent, 0.5),
    ):
        default = StepOptions(scheme=scheme)
        assert isinstance(default.perturbation, kind)
        assert default.default_eps == eps
    with pytest.raises(AttributeError):
        options.interval = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="`interval` must be"):
        StepOptions(interval=0)


def test_an_unknown_option_names_the_similar_one() -> None:
    with pytest.raises(TypeError, match=r"'normalise'.*Did you mean `normalize`"):
        StepOptions.from_arguments({"normalise": True})


def test_a_config_holds_the_perturbation_itself() -> None:
    options = StepOptions(perturbation=RelativeBall(radius="sphere"))
    config = options.config()
    assert set(config) == set(OPTION_NAMES)
    restored = keras.saving.deserialize_keras_object(config["perturbation"])
    assert restored.radius == "sphere"


def test_a_wrapped_model_shows_its_options_and_lets_none_be_assigned() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    nrs = keras_nrs.wrap(model, beta=0.5)
    assert nrs.beta == nrs.step_options.beta == 0.5
    for name in OPTION_NAMES:
        with pytest.raises(AttributeError, match=f"`{name}` is set by wrap"):
            setattr(nrs, name, getattr(nrs, name))
