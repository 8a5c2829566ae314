"""What is compared: plain trainings, and settings of `wrap()` in order of promise."""

import json
import re
import warnings
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_nrs._checks import check_positive
from keras_nrs.step.options import OPTION_NAMES
from keras_nrs.step.options import StepOptions
from keras_nrs.wrapping import wrap

BASELINE = "baseline"
PLAIN_SCHEME = "baseline"
# From the study (docs/results.md): first what asks for least.
DEFAULTS: dict[str, dict[str, Any]] = {
    "NRS, by default": {},
    "RPR": {"scheme": "rpr"},
    "NRS, eps 0.4": {"eps": 0.4},
    "RPR, twice the epochs": {"scheme": "rpr", "epochs": 2},
    "NRS, eps 0.4, alpha 4": {"eps": 0.4, "alpha": 4.0},
    "NRS, eps 0.6, alpha 4": {"eps": 0.6, "alpha": 4.0},
    "NRS, filterwise, eps 0.15, alpha 4": {
        "perturbation": "filterwise",
        "eps": 0.15,
        "alpha": 4.0,
    },
    "SAM": {"scheme": "sam"},
}
_FACTORS = {2.0: "twice", 3.0: "three times", 4.0: "four times"}


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Attributes:
        name: How the table calls it.
        arguments: Arguments of `wrap()`; `None` for a plain training.
        factor: What the number of epochs is multiplied by.
        passes: Passes through the model, forward and back, in a step.
        needs_auto_divergence: Whether the divergence is that of the compiled loss.
    """

    name: str
    arguments: dict[str, Any] | None = None
    factor: float = 1.0
    passes: float = 1.0
    needs_auto_divergence: bool = False

    @property
    def cost(self) -> float:
        """Price of a training, in plain trainings: counted, not measured."""
        # Rounded: 0.1 * 3 is no other cost than 0.3.
        return round(self.passes * self.factor, 6)

    @property
    def is_plain(self) -> bool:
        """Whether the model is trained as it is."""
        return self.arguments is None

    @property
    def is_baseline(self) -> bool:
        """Whether the model is trained as it is, and no longer."""
        return self.is_plain and self.factor == 1

    @property
    def identity(self) -> str:
        """The arguments as text, which names of settings do not change."""
        if self.arguments is None:
            return "plain"
        return json.dumps(self.arguments, sort_keys=True, default=_as_json)

    @property
    def call(self) -> str:
        """The line of code."""
        if self.arguments is None:
            return "model"
        values = [f"{name}={value!r}" for name, value in self.arguments.items()]
        return f"keras_nrs.wrap({', '.join(['model', *values])})"

    def epochs(self, plain: int) -> int:
        """Number of epochs, where a plain training has `plain`."""
        return max(1, round(plain * self.factor))

    def applied_to(self, model: keras.Model, seed: int) -> keras.Model:
        """The model that `fit()` is called on."""
        if self.arguments is None:
            return model
        return wrap(model, seed=seed, **self.arguments)


def settings_from(given: Mapping[str, Mapping[str, Any]] | None) -> list[Setting]:
    """The settings to try, in the order given: after the plain trainings they need.

    For each cost among the settings there is a plain training of that many times the
    epochs.

    Args:
        given: As for `tune()`.

    Raises:
        TypeError, ValueError: if `given` is not as described there.
    """
    given = DEFAULTS if given is None else given
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            "`settings` must be a dict of at least one setting, such as {'eps 0.4': "
            f"{{'eps': 0.4}}}}. Received: settings={given!r}."
        )
    settings = [_setting(name, arguments) for name, arguments in given.items()]
    plain = [setting for setting in settings if setting.is_plain]
    needed = {1.0} | {setting.cost for setting in settings if setting.cost > 1}
    plain += [
        Setting(_plain_name(cost), None, cost)
        for cost in needed - {setting.cost for setting in plain}
    ]
    others = [setting for setting in settings if not setting.is_plain]
    found = [*sorted(plain, key=lambda setting: setting.cost), *others]
    names = [setting.name for setting in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`settings` must not have the name {name!r}, which is a plain "
                "training's. Choose another name."
            )
    _check_different(found)
    return found


def _check_different(settings: Iterable[Setting]) -> None:
    """Raise an error if two settings would share their trainings."""
    names: dict[tuple[str, float], str] = {}
    for setting in settings:
        key = setting.identity, setting.factor
        if key in names:
            raise ValueError(
                "`settings` must differ in their arguments. Received: "
                f"{names[key]!r} and {setting.name!r} with {setting.identity}. Leave "
                "one out. Or, if they have objects of your own that differ, give their "
                "class a get_config()."
            )
        names[key] = setting.name


def rivals_of(setting: Setting, settings: Iterable[Setting]) -> list[Setting]:
    """The other plain trainings that cost no more, and the baseline in any case.

    The baseline has none: it is what others must beat.
    """
    if setting.is_baseline:
        return []
    cost = max(1.0, setting.cost)
    return [
        other
        for other in settings
        if other.is_plain and other != setting and other.cost <= cost
    ]


def _setting(name: str, given: Mapping[str, Any]) -> Setting:
    if not isinstance(name, str) or not isinstance(given, Mapping):
        raise TypeError(
            "`settings` must be a dict from names to dicts of arguments of wrap(), "
            f"and `epochs`. Received: {name!r}: {given!r}."
        )
    arguments = dict(given)
    factor = check_positive(f"settings[{name!r}]['epochs']", arguments.pop("epochs", 1))
    if "seed" in arguments:
        raise ValueError(
            "`settings` must not have a `seed`: tune() gives each training its own. "
            f"Received: {name!r}: {given!r}. Leave it out."
        )
    if arguments.get("scheme") == PLAIN_SCHEME:
        if len(arguments) > 1:
            raise ValueError(
                "`settings` must have no argument beside scheme='baseline', which "
                f"does not perturb, but `epochs`. Received: {name!r}: {given!r}."
            )
        return Setting(name, None, factor)
    options = {k: v for k, v in arguments.items() if k in OPTION_NAMES}
    step = StepOptions(**options)
    is_auto = step.has_divergence and "divergence" not in arguments
    return Setting(name, arguments, factor, _passes(step), is_auto)


def _passes(options: StepOptions) -> float:
    """Passes in a step, in the mean over steps."""
    further = len(options.signs) * options.perturbed_fraction
    return 1 + further / options.interval


def _plain_name(factor: float) -> str:
    if factor == 1:
        return BASELINE
    times = _FACTORS.get(factor, f"{factor:g} times")
    return f"{BASELINE}, {times} the epochs"


def _as_json(value: Any) -> Any:
    """A perturbation, divergence or schedule as JSON."""
    try:
        return serialized(value)
    except (TypeError, ValueError, NotImplementedError):
        return [re.sub(r" at 0x\w+", "", repr(value)), plain_members(value)]


def serialized(value: Any) -> Any:
    """As Keras serializes it, but silent about lambdas: nothing is to be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keras.saving.serialize_keras_object(value)


def plain_members(value: Any) -> dict[str, Any]:
    """The numbers and texts among an object's attributes."""
    members = getattr(value, "__dict__", {})
    return {k: v for k, v in members.items() if isinstance(v, str | int | float)}
