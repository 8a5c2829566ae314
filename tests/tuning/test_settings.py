"""What is compared, what it costs, and with which plain trainings."""

from typing import Any

import keras
import pytest

import keras_nrs
from keras_nrs.tuning.settings import BASELINE
from keras_nrs.tuning.settings import DEFAULTS
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import rivals_of
from keras_nrs.tuning.settings import settings_from
from tests.support.networks import cnn

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

TWICE = "baseline, twice the epochs"


def named(settings: list[Setting]) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


def test_the_defaults_begin_with_plain_trainings_and_what_wrap_does() -> None:
    settings = settings_from(None)
    assert [s.name for s in settings] == [BASELINE, TWICE, *DEFAULTS]
    costs = {s.name: s.cost for s in settings}
    assert costs == {BASELINE: 1, TWICE: 2, "RPR": 1} | {
        name: 2 for name in DEFAULTS if name != "RPR"
    }
    assert settings[2].arguments == {}
    assert settings[2].call == "keras_nrs.wrap(model)"
    assert named(settings)["NRS, eps 0.4"].call == "keras_nrs.wrap(model, eps=0.4)"


@pytest.mark.parametrize(
    ("arguments", "cost"),
    [
        ({}, 2),
        ({"scheme": "baseline"}, 1),
        ({"scheme": "rpr"}, 1),
        ({"scheme": "rpr", "clean_pass": True}, 2),
        ({"scheme": "rpr", "antithetic": "same_samples"}, 2),
        ({"scheme": "sam"}, 2),
        ({"antithetic": "same_samples"}, 3),
        ({"interval": 4}, 1.25),
        ({"interval": 4, "epochs": 2}, 2.5),
        ({"scheme": "rpr", "epochs": 1 + 0.1 + 0.2}, 1.3),
        ({"perturbed_fraction": 0.5}, 1.5),
        ({"epochs": 1.5}, 3),
    ],
)
def test_costs_are_counted(arguments: dict[str, Any], cost: float) -> None:
    settings = settings_from({"mine": arguments})
    mine = named(settings)["mine"]
    assert mine.cost == cost
    plain = {s.cost for s in settings if s.is_plain}
    assert plain == {1, cost}
    rivals = [s.cost for s in rivals_of(mine, settings)]
    assert rivals == ([] if mine.is_baseline else sorted({1, cost} - {mine.is_plain}))


def test_rivals_cost_no_more() -> None:
    settings = settings_from(
        {
            "four": {"epochs": 2},
            "one": {"scheme": "rpr"},
            "half": {"scheme": "rpr", "epochs": 0.5},
            "long": {"scheme": "baseline", "epochs": 8},
        }
    )
    by_name = named(settings)
    four_times = "baseline, four times the epochs"
    assert [s.name for s in settings][:3] == [BASELINE, four_times, "long"]
    for name, rivals in (
        ("four", [BASELINE, four_times]),
        ("one", [BASELINE]),
        ("half", [BASELINE]),
        ("long", [BASELINE, four_times]),
        (four_times, [BASELINE]),
        (BASELINE, []),
    ):
        found = rivals_of(by_name[name], settings)
        assert [rival.name for rival in found] == rivals, name


def test_the_baseline_has_no_rival() -> None:
    settings = settings_from({"short": {"scheme": "baseline", "epochs": 0.5}})
    rivals = {s.name: [r.name for r in rivals_of(s, settings)] for s in settings}
    assert rivals == {"short": [BASELINE], BASELINE: []}


def test_names_of_plain_trainings_tell_their_costs_apart() -> None:
    names = named(settings_from({"two": {}, "more": {"interval": 4, "epochs": 2}}))
    assert names.keys() >= {TWICE, "baseline, 2.5 times the epochs"}
    # 2.2000000000000002 and 2.2.
    alike = {"NRS": {"epochs": 1.1}, "RPR": {"scheme": "rpr", "epochs": 2.2}}
    assert len(settings_from(alike)) == 4


class Own(keras_nrs.perturbations.Perturbation):
    """A user's own, without a `get_config()`."""

    def __init__(self, size: float) -> None:
        self.size = size

    def sample(self, weights: Any, eps: Any, rng: Any) -> Any:
        return [self.size * keras.ops.ones_like(w) for w in weights]


def test_numbers_of_epochs() -> None:
    assert Setting("half", None, 0.5).epochs(5) == 2
    assert Setting("a tenth", None, 0.1).epochs(1) == 1
    assert Setting("twice", None, 2).epochs(3) == 6


def test_a_plain_training_has_the_model_itself() -> None:
    model = cnn()
    plain, nrs = settings_from({"NRS": {"eps": 0.3}})[::2]
    assert plain.applied_to(model, 1) is model
    wrapped = nrs.applied_to(model, 1)
    assert keras_nrs.unwrap(wrapped) is model
    assert float(wrapped.eps) == pytest.approx(0.3)


def test_identities_are_those_of_arguments() -> None:
    perturbations = keras_nrs.perturbations
    schedule = keras.optimizers.schedules.PolynomialDecay

    def identity(**arguments: Any) -> str:
        return settings_from({"mine": arguments})[-1].identity

    assert identity(eps=0.1, alpha=2) == identity(alpha=2, eps=0.1) != identity(eps=0.1)
    one, same, other = (
        identity(perturbation=perturbations.RelativeBall(noise=noise))
        for noise in ("normal", "normal", "rademacher")
    )
    assert one == same != other
    assert identity(eps=schedule(0.0, 10, 0.1)) == identity(eps=schedule(0.0, 10, 0.1))
    assert identity(eps=schedule(0.0, 10, 0.1)) != identity(eps=schedule(0.0, 10, 0.2))
    one, same, other = (identity(perturbation=Own(size)) for size in (0.1, 0.1, 0.2))
    assert one == same != other
    # No warning, as where a lambda is saved.
    where = perturbations.RelativeBall(where=lambda variable: True)
    assert "__lambda__" in identity(perturbation=where)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "`settings` must be a dict of at least one"),
        ([{"eps": 1}], TypeError, "`settings` must be a dict of at least one"),
        ({"a": 0.4}, TypeError, "a dict from names to dicts of arguments of wrap"),
        (
            {"a": {"epochs": 0}},
            ValueError,
            r"`settings\['a'\]\['epochs'\]` must be > 0",
        ),
        ({"a": {"seed": 1}}, ValueError, "must not have a `seed`"),
        ({"a": {"scheme": "baseline", "eps": 1}}, ValueError, "no argument beside"),
        ({"a": {"scheme": "nsr"}}, ValueError, "`scheme` must be one of"),
        ({"baseline": {"eps": 1}}, ValueError, "must not have the name 'baseline'"),
        (
            {"a": {"eps": 1}, "b": {"eps": 1}},
            ValueError,
            "must differ in their arguments. Received: 'a' and 'b'",
        ),
    ],
)
def test_bad_settings(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings_from(settings)
