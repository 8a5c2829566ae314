"""The arms of the study, ways to train, in order of priority."""

from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from itertools import product
from typing import Any

import keras

import keras_nrs
from keras_nrs.perturbations import NAMES
from keras_nrs.step.options import OPTION_NAMES
from studies.cheap_steps import CHEAP_STEP_TASKS
from studies.tasks import Settings
from studies.tasks import Task

BASELINE = "baseline"
TWICE = "baseline, twice the epochs"
DEFAULT = "NRS, by default"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train.

    Attributes:
        fixed: Settings that are not chosen, as `training.train()` takes them.
        choices: What it chooses from. Empty: the task's learning rates and weight
            decays. The other arms take these from the baseline.
        passes: Mean number of passes through the network, forward and back, in a step.
        is_main: Whether it comes before the others.
        needs: Options of `wrap()` without which it is left out.
        tasks: Names of the tasks that it can train; by default all.
    """

    fixed: Settings = field(default_factory=dict)
    choices: list[Settings] = field(default_factory=list)
    passes: float = 1
    is_main: bool = False
    needs: str | None = None
    tasks: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """Price of a training, in plain trainings."""
        epochs: float = self.fixed.get("epochs", 1)
        return self.passes * epochs

    @property
    def is_available(self) -> bool:
        """Whether this version of `wrap()` has what the arm needs."""
        return self.needs is None or self.needs in OPTION_NAMES

    def trains(self, task: str) -> bool:
        """Whether it can train the task of a name."""
        return not self.tasks or task in self.tasks

    def candidates(self, task: Task, shared: Settings) -> list[Settings]:
        """The settings it chooses from, in full.

        Args:
            task: The task.
            shared: The baseline's choice.
        """
        choices = self.choices or task.baseline_settings()
        return [shared | self.fixed | choice for choice in choices]


def default_settings() -> Settings:
    """What `keras_nrs.wrap(model)` does, as arguments.

    They are part of the name of a run, so another default makes other runs.
    """
    model = keras_nrs.wrap(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    kind = type(model.perturbation)
    names = {perturbation: name for name, perturbation in NAMES.items()}
    options = {name: getattr(model, name) for name in ("scheme", "beta", "normalize")}
    return options | {"perturbation": names[kind]} | model.given_coefficients()


def _grid(**values: Iterable[Any]) -> list[Settings]:
    return [dict(zip(values, v, strict=True)) for v in product(*values.values())]


def _noise(perturbation: str, *eps: float, **others: Iterable[Any]) -> list[Settings]:
    return _grid(perturbation=[perturbation], eps=eps, **others)


_ALPHAS = (1.0, 4.0)
_ONE_PASS = [*_noise("relative", 0.2, 0.4, 0.6), *_noise("filterwise", 0.15, 0.3, 0.5)]
_RELATIVE = _noise("relative", 0.2, 0.4, 0.6, alpha=_ALPHAS)
_FILTERWISE = _noise("filterwise", 0.15, 0.3, 0.5, alpha=_ALPHAS)
_RPR: Settings = {"scheme": "rpr"}
_NRS: Settings = {"scheme": "nrs", "normalize": True}


def _rpr(epochs: float, **arguments: Any) -> Arm:
    fixed = _RPR | ({"epochs": epochs} if epochs > 1 else {})
    return Arm(fixed=fixed, choices=_ONE_PASS, needs="clean_pass", **arguments)


def _cheap_step(choices: list[Settings], passes: float, **fixed: float) -> Arm:
    return Arm(fixed=fixed, choices=choices, passes=passes, tasks=CHEAP_STEP_TASKS)


def _nrs(choices: list[Settings], **arguments: Any) -> Arm:
    fixed = _NRS | arguments.pop("fixed", {})
    return Arm(fixed=fixed, choices=choices, **({"passes": 2} | arguments))


ARMS = {
    BASELINE: Arm(is_main=True),
    TWICE: Arm(fixed={"epochs": 2}, is_main=True),
    "label smoothing": Arm(
        choices=_grid(label_smoothing=(0.02, 0.05, 0.1, 0.2, 0.3, 0.4)), is_main=True
    ),
    "SAM": Arm(
        fixed={"scheme": "sam"},
        choices=_grid(eps=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5)),
        passes=2,
        is_main=True,
    ),
    "RPR": _rpr(1, is_main=True),
    "RPR, twice the epochs": _rpr(2, is_main=True),
    "NRS, alpha 0": _nrs(_ONE_PASS, fixed={"alpha": 0.0}, is_main=True),
    "NRS, relative": _nrs(_RELATIVE, is_main=True),
    "NRS, filterwise": _nrs(_FILTERWISE, is_main=True),
    DEFAULT: Arm(choices=[default_settings()], passes=2, is_main=True),
    "NRS, relative, twice the epochs": _nrs(_RELATIVE, fixed={"epochs": 2}),
    "baseline, four times the epochs": Arm(fixed={"epochs": 4}),
    "RPR, four times the epochs": _rpr(4),
    "NRS, last third of the epochs": _nrs(
        _RELATIVE, fixed={"perturbed_from": 2 / 3}, passes=4 / 3
    ),
    "NRS, every second step": _nrs(_RELATIVE, fixed={"interval": 2}, passes=1.5),
    # No step of the first third, every second of the second one, then all.
    "NRS, a growing share of the steps": _nrs(
        _RELATIVE, fixed={"share_grows": True}, passes=1.5
    ),
    "NRS, half of each batch": _nrs(
        _RELATIVE, fixed={"perturbed_fraction": 0.5}, passes=1.5
    ),
    "RPR, 1.5 times the epochs": _rpr(1.5),
    "NRS, samples shared out, no divergence": _cheap_step(
        _ONE_PASS, 1, in_both_passes=0.0
    ),
    "NRS, samples shared out": _cheap_step(_RELATIVE, 4 / 3, in_both_passes=1 / 3),
    "NRS, EMA as the reference": _cheap_step(_RELATIVE, 4 / 3, reference_momentum=0.99),
    "ASAM": Arm(
        fixed={"scheme": "asam"},
        choices=_grid(eps=(0.1, 0.2, 0.5, 1.0, 1.5, 2.0)),
        passes=2,
    ),
    "EMA of weights": Arm(
        choices=_grid(ema_momentum=(0.9, 0.95, 0.98, 0.99, 0.995, 0.998))
    ),
    "SWA of weights": Arm(
        choices=_grid(averaged_from=(0.5, 0.75), averaged_rate=(0.05, 0.2, 0.5))
    ),
    "dropout": Arm(choices=_grid(dropout=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5))),
    "l2 of the last layer": Arm(
        choices=_grid(last_layer_penalty=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
    ),
    "NRS, elementwise": _nrs(_noise("elementwise", 0.15, 0.3, 0.5, alpha=_ALPHAS)),
    "NRS, antithetic": _nrs(
        _FILTERWISE,
        fixed={"antithetic": True, "perturbations_per_replica": 2},
        needs="antithetic",
    ),
    "NRS, growing eps": _nrs(_RELATIVE, fixed={"eps_grows": 10.0}),
    "NRS, the paper's ball": _nrs(_noise("ball", 0.1, alpha=[1.0])),
    "NRS, released": _nrs(_noise("released", 0.1, alpha=[1.0])),
}
