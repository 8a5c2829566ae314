"""The arguments of `wrap()` that shape a training step."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import TypedDict

import keras

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_fraction
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._schemes import OWN_PERTURBATIONS
from keras_nrs._schemes import SCHEMES
from keras_nrs._schemes import check_own_perturbation
from keras_nrs._signatures import Function
from keras_nrs._signatures import spell_out
from keras_nrs.perturbations import NAMES
from keras_nrs.perturbations import Perturbation
from keras_nrs.perturbations import get_perturbation

# Of the settings that the study tried on all main tasks, the one that lost least on its
# worst task: `python -m studies default`.
DEFAULT_PERTURBATION = "relative"
_DEFAULT_EPS = 0.2
_ASCENT_EPS = {"sam": 0.05, "asam": 0.5}


class StepArguments(TypedDict, total=False):
    """The fields of `StepOptions` as users pass them, for type checkers."""

    beta: float
    scheme: str
    perturbation: str | Perturbation | None
    interval: int
    normalize: bool
    perturbations_per_replica: int
    sync_perturbation: bool
    perturbed_fraction: float
    memory_efficient: bool
    clean_pass: bool
    antithetic: bool | str


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a training step: `keras_nrs.wrap()` describes each field.

    Raises:
        TypeError, ValueError: if a field is not as described there.
    """

    beta: float = 1.0
    scheme: str = "nrs"
    # A name, or `None` for the scheme's own, until it is checked.
    perturbation: Perturbation = None  # type: ignore[assignment]
    interval: int = 1
    normalize: bool = True
    perturbations_per_replica: int = 1
    sync_perturbation: bool = False
    perturbed_fraction: float = 1.0
    memory_efficient: bool = False
    clean_pass: bool = False
    antithetic: bool | str = False

    def __post_init__(self) -> None:
        scheme = check_choice("scheme", self.scheme, SCHEMES)
        perturbation: Any = self.perturbation
        if perturbation is None:
            perturbation = OWN_PERTURBATIONS.get(scheme, DEFAULT_PERTURBATION)
        checked = {
            "beta": check_nonnegative("beta", self.beta),
            "scheme": scheme,
            "perturbation": get_perturbation(perturbation),
            "interval": check_int("interval", self.interval, minimum=1),
            "normalize": check_bool("normalize", self.normalize),
            "perturbations_per_replica": check_int(
                "perturbations_per_replica", self.perturbations_per_replica, minimum=1
            ),
            "sync_perturbation": check_bool(
                "sync_perturbation", self.sync_perturbation
            ),
            "perturbed_fraction": check_fraction(
                "perturbed_fraction", self.perturbed_fraction
            ),
            "memory_efficient": check_bool("memory_efficient", self.memory_efficient),
            "clean_pass": check_bool("clean_pass", self.clean_pass),
            "antithetic": _check_antithetic(self.antithetic),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        kind = type(self.perturbation)
        own_name = next((name for name in NAMES if NAMES[name] is kind), None)
        check_own_perturbation(scheme, own_name, kind.__name__)
        self._check_combination()

    def _check_combination(self) -> None:
        """Raise an error for options that exclude each other."""
        if self.clean_pass and self.scheme != "rpr":
            raise ValueError(
                "`clean_pass` must be False with schemes other than 'rpr', the only "
                "one that can do without that pass. Received: clean_pass=True, "
                f"scheme={self.scheme!r}. Leave it out."
            )
        if self.perturbed_fraction < 1 and not self.runs_at_theta:
            raise ValueError(
                "`perturbed_fraction` must be 1 with scheme='rpr', which runs one pass "
                "alone, at theta + delta: the rest of the batch would have none. "
                f"Received: perturbed_fraction={self.perturbed_fraction}. Pass "
                "clean_pass=True, or scheme='nrs'."
            )
        if self.antithetic and self.perturbation.needs_gradients:
            raise ValueError(
                "`antithetic` must be False with a perturbation along the gradient, "
                "whose negative leads down. Received: antithetic="
                f"{self.antithetic!r}, perturbation={type(self.perturbation).__name__}."
                " Leave it out, or pass a random perturbation such as 'relative'."
            )

    def check_pairs(self, num_replicas: int) -> None:
        """Raise an error if `antithetic=True` leaves a delta without another one.

        Args:
            num_replicas: Number of devices among which a batch is split.
        """
        number = self.perturbations_per_replica
        num_deltas = number if self.sync_perturbation else number * num_replicas
        if self.antithetic is True and self.scheme != "baseline" and num_deltas % 2:
            raise ValueError(
                "`antithetic=True` needs an even number of perturbations, which are "
                f"paired. Received: perturbations_per_replica={number}, "
                f"sync_perturbation={self.sync_perturbation}, on {num_replicas} "
                "device(s). Pass perturbations_per_replica=2, or "
                "antithetic='same_samples', which needs no second group."
            )

    @property
    def default_eps(self) -> float:
        """The eps of `wrap()` without one."""
        return _ASCENT_EPS.get(self.scheme, _DEFAULT_EPS)

    @property
    def has_divergence(self) -> bool:
        """Whether steps compute the divergence, as a term or for logs."""
        return self.scheme == "nrs" or self.clean_pass

    @property
    def runs_at_theta(self) -> bool:
        """Whether the first pass of a perturbed step is at theta, not theta + delta."""
        is_rpr = self.scheme == "rpr" and not self.clean_pass
        return not is_rpr or self.perturbation.needs_gradients

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs of delta in the passes that follow the first one."""
        signs = (1, -1) if self.antithetic == "same_samples" else (1,)
        return signs if self.runs_at_theta else signs[1:]

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "StepOptions":
        """Check the keyword arguments of `wrap()`.

        Raises:
            TypeError: if an argument has no such name.
        """
        for name in arguments:
            if name not in OPTION_NAMES:
                similar = difflib.get_close_matches(name, OPTION_NAMES, n=1)
                hint = f" Did you mean `{similar[0]}`?" if similar else ""
                raise TypeError(
                    f"wrap() got an unexpected keyword argument '{name}'. Its options "
                    f"are {list(OPTION_NAMES)}.{hint}"
                )
        return cls(**arguments)

    def changed(self) -> dict[str, Any]:
        """The scheme, the perturbation, and the options that are not by default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        options = {name: getattr(self, name) for name in OPTION_NAMES}
        shown = ("scheme", "perturbation")
        return {
            name: value
            for name, value in options.items()
            if name in shown or value != defaults[name]
        }

    def config(self) -> dict[str, Any]:
        """The options as Keras saves them, which `wrap()` takes again."""
        # `asdict()` would copy the perturbation.
        config = {name: getattr(self, name) for name in OPTION_NAMES}
        config["perturbation"] = keras.saving.serialize_keras_object(self.perturbation)
        return config


def _check_antithetic(value: Any) -> bool | str:
    if isinstance(value, bool) or value == "same_samples":
        return value
    raise (ValueError if isinstance(value, str) else TypeError)(
        "`antithetic` must be True, False or 'same_samples'. Received: "
        f"antithetic={value!r} of type {type(value).__name__}."
    )


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(StepOptions))


def with_spelled_options(function: Function) -> Function:
    """Let the signature of a function with `**options` name every option."""
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=StepArguments.__annotations__[field.name],
        )
        for field in dataclasses.fields(StepOptions)
    ]
    return spell_out(function, options)
