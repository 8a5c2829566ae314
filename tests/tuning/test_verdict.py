"""Which setting is best, by differences in pairs of equal seeds."""

import math
from typing import Any

import numpy as np
import pytest

from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.settings import settings_from
from keras_nrs.tuning.verdict import Verdict
from keras_nrs.tuning.verdict import judge
from keras_nrs.tuning.verdict import sentence
from keras_nrs.tuning.verdict import with_interval
from tests.tuning.made_up import ACCURACY
from tests.tuning.made_up import LOSS
from tests.tuning.made_up import row

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

BASE, TWICE = "baseline", "baseline, twice the epochs"
SETTINGS = settings_from({"NRS": {"eps": 0.4}, "RPR": {"scheme": "rpr"}})


def judged(metric: Metric = ACCURACY, **accuracies: list[float]) -> Verdict:
    """The verdict on accuracies of seeds, by the first letters of the settings."""
    names = {"base": BASE, "twice": TWICE, "nrs": "NRS", "rpr": "RPR"}
    rows = {
        names[name]: {
            seed: row(value, failed=math.isnan(value))
            for seed, value in enumerate(values)
        }
        for name, values in accuracies.items()
    }
    return judge([s for s in SETTINGS if s.name in rows], rows, metric)


def test_differences_are_of_equal_seeds() -> None:
    verdict = judged(base=[0.5, 0.7, 0.6], twice=[0.5, 0.7, 0.6], nrs=[0.6, 0.9, 0.9])
    first, second = verdict.differences["NRS"]
    assert (first.rival.name, second.rival.name) == (BASE, TWICE)
    assert first.num == 3
    assert first.mean == pytest.approx(0.2)
    # The deviation of 0.1, 0.2, 0.3 is 0.1, and the quantile with 2 degrees is 4.3027.
    assert first.width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert verdict.differences[BASE] == []


STEADY = {"base": [0.50, 0.51, 0.52], "twice": [0.55, 0.57, 0.56]}


def test_a_setting_must_beat_each_plain_training_that_costs_no_more() -> None:
    # Better than the baseline, no better than twice the epochs: which is the answer.
    verdict = judged(**STEADY, nrs=[0.56, 0.56, 0.56], rpr=[0.50, 0.52, 0.51])
    assert verdict.best.name == TWICE
    assert [setting.name for setting in verdict.winners] == [TWICE]
    # Better than both.
    assert judged(**STEADY, nrs=[0.60, 0.615, 0.61]).best.name == "NRS"
    # A setting of one pass need not beat the training that costs two.
    short = STEADY | {"twice": [0.50, 0.52, 0.51]}
    assert judged(**short, rpr=[0.53, 0.54, 0.555]).best.name == "RPR"
    # By their means where several win, with a loss the lowest.
    many = {"nrs": [0.60, 0.615, 0.61], "rpr": [0.7, 0.71, 0.725]}
    assert judged(**STEADY, **many).best.name == "RPR"
    assert judged(LOSS, **STEADY, **many).best.name == "RPR"


def test_without_a_clear_winner_the_baseline_stays() -> None:
    noisy = judged(base=[0.5, 0.6, 0.7], twice=[0.6, 0.5, 0.8], nrs=[0.9, 0.6, 0.8])
    assert noisy.best.name == BASE
    text = sentence(noisy, ACCURACY, 10)
    assert text.startswith("Keep the baseline: no setting is clearly better")
    assert "The nearest is 'NRS': accuracy +16.67 ± " in text
    assert text.endswith("Few seeds (3) have judged: only large differences show.")


def test_a_failed_training_loses() -> None:
    better = [0.60, 0.615, 0.61, 0.62]
    plain = {name: [*values, 0.5] for name, values in STEADY.items()}
    assert judged(**plain, nrs=better).best.name == "NRS"
    failed = judged(**plain, nrs=[*better[:3], math.nan])
    assert "NRS" not in {setting.name for setting in failed.winners}
    assert failed.differences["NRS"][0].num == 3
    # The baseline's failed training is left out of the pairs.
    plain["base"] = [math.nan, *plain["base"][1:]]
    assert judged(**plain, nrs=better).differences["NRS"][0].num == 3
    alone = judged(base=[math.nan] * 2, twice=[0.5, 0.6], nrs=[0.7, 0.8])
    assert alone.best.name == BASE
    assert "lower its learning rate" in sentence(alone, ACCURACY, 10)


def test_failures_are_named_as_the_reason() -> None:
    """Not the budget, and no difference that seems to win."""
    nan, steady = math.nan, [0.50, 0.51, 0.52]
    text = sentence(judged(base=steady, rpr=[nan] * 3), ACCURACY, 10)
    assert "budget" not in text and "Trainings of 'RPR' failed" in text
    no_rival = judged(base=steady, twice=[nan] * 3, nrs=[0.7, 0.8, 0.9])
    assert f"Trainings of {TWICE!r} failed" in sentence(no_rival, ACCURACY, 10)
    better: Any = [0.70, 0.71, 0.725, nan]
    some = judged(base=[*steady, 0.5], rpr=better)
    text = sentence(some, ACCURACY, 10)
    assert "The nearest is 'RPR'" in text and "but some of its trainings failed" in text
    other = judged(base=[*steady, 0.5], twice=[0.5, 0.5, 0.52, 0.5], rpr=better)
    assert f"The nearest is {TWICE!r}" in sentence(other, ACCURACY, 10)


def test_one_seed_decides_nothing() -> None:
    verdict = judged(base=[0.5], twice=[0.5], nrs=[0.9])
    assert verdict.best.name == BASE
    assert math.isnan(verdict.differences["NRS"][0].width)


def test_sentences() -> None:
    five: Any = {"base": [0.5] * 5, "twice": [0.5, 0.52] * 2 + [0.5]}
    nrs = judged(**five, nrs=list(np.linspace(0.7, 0.74, 5)))
    assert sentence(nrs, ACCURACY, 10) == (
        "Train keras_nrs.wrap(model, eps=0.4): accuracy +22.00 ± 1.96 points against "
        "'baseline' and +21.20 ± 2.39 points against 'baseline, twice the epochs'."
    )
    five["twice"] = [0.6, 0.61, 0.62, 0.63, 0.64]
    text = sentence(judged(**five), LOSS, 10)
    assert text.startswith("Keep the baseline, and train it for 20 epochs: ")
    assert "budget did not suffice" in sentence(judged(base=[0.5]), ACCURACY, 10)


def test_text_of_intervals() -> None:
    assert with_interval(0.0123, 0.004, ACCURACY) == "+1.23 ± 0.40"
    assert with_interval(-0.0123, math.nan, LOSS) == "-0.012"
    assert with_interval(math.nan, math.nan, LOSS) == ""
    # A loss may be small: of a mean squared error, for instance.
    assert with_interval(-0.00012, 0.00003, LOSS) == "-0.00012 ± 0.00003"
    assert with_interval(0.00012, math.nan, LOSS) == "+0.0001"
    assert with_interval(0.1, 1.7e-17, LOSS) == "+0.100 ± 0.000"
    assert with_interval(0.0, 0.0, ACCURACY) == "+0.00 ± 0.00"
