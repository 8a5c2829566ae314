"""The ways to train that the study compares, and the settings to choose from."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from keras_nrs.experiments import demo

Settings = dict[str, float]
Grid = list[Settings]


def grid(**values: Iterable[float]) -> Grid:
    """All combinations of values, as settings."""
    return [dict(zip(values, v, strict=True)) for v in product(*values.values())]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train.

    Attributes:
        scheme: As in `wrap()`; `None` leaves the model unwrapped.
        perturbation: As in `wrap()`.
        loss_weight: Weight of the compiled loss.
        grid: Settings to choose from.
        alpha_of: Name of another arm, whose alpha this arm takes.
        fixed: Settings that are not chosen.
    """

    scheme: str | None = "nrs"
    perturbation: str = "relative"
    loss_weight: float = 1.0
    grid: Grid
    alpha_of: str | None = None
    fixed: Settings


def _arm(grid: Grid, **arguments: Any) -> Arm:
    return Arm(grid=grid, **{"fixed": {}} | arguments)


RELATIVE_EPS = (0.15, 0.3, 0.5)
NRS, ADAPTED = "NRS", "NRS, eps by target"
ARMS = {
    demo.BASELINE: _arm(
        grid(learning_rate=(1e-3, 3e-3, 1e-2), weight_decay=(0.01, 0.1, 1.0)),
        scheme=None,
    ),
    demo.TWICE_THE_LOSS: _arm([{}], scheme=None, loss_weight=2.0),
    demo.RPR: _arm(grid(eps=RELATIVE_EPS), scheme="rpr"),
    demo.NRS_ALPHA_0: _arm(grid(eps=RELATIVE_EPS), fixed={"alpha": 0.0}),
    NRS: _arm(grid(eps=RELATIVE_EPS, alpha=(0.5, 1.0, 4.0))),
    "NRS, the paper's ball": _arm(
        [{}], perturbation="ball", fixed={"eps": 0.1, "alpha": 1.0}
    ),
    "NRS, ball": _arm(grid(eps=(1.0, 3.0, 6.0)), perturbation="ball", alpha_of=NRS),
    "NRS, layerwise": _arm(
        grid(eps=(0.05, 0.1, 0.2)), perturbation="layerwise", alpha_of=NRS
    ),
    "NRS, released": _arm(
        grid(eps=(0.1, 0.25, 0.5)), perturbation="released", alpha_of=NRS
    ),
    ADAPTED: _arm(grid(target=(0.01, 0.03, 0.1, 0.3), alpha=(1.0, 4.0))),
}
# A rule trains an arm with settings that were best for other tasks.
RULES = {"rule: fixed eps": NRS, "rule: eps by target": ADAPTED}
