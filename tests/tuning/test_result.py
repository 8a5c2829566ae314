"""The table that `tune()` returns, as numbers and as text."""

import math
from typing import Any

import keras
import pytest

from keras_nrs import TuneResult
from keras_nrs.tuning.budget import Budget
from keras_nrs.tuning.race import Race
from keras_nrs.tuning.result import table_of
from keras_nrs.tuning.settings import settings_from
from keras_nrs.tuning.verdict import judge
from tests.tuning.made_up import ACCURACY
from tests.tuning.made_up import row

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def table() -> list[dict[str, Any]]:
    """Of two plain trainings, NRS, and a setting that only one seed has seen."""
    settings = settings_from({"NRS": {}, "RPR": {"scheme": "rpr"}})
    baseline, twice, nrs, rpr = (setting.name for setting in settings)
    race = Race(settings, ACCURACY, seeds=3, budget=Budget(10))
    race.choosing = {rpr: {1000: row(0.4)}}
    race.judging = {
        baseline: {i: row(0.5) for i in range(3)},
        twice: {i: row(0.6, seconds=2.0 + i) for i in range(3)},
        nrs: {i: row(0.7 + 0.1 * i, failed=i == 2) for i in range(3)},
    }
    verdict = judge(settings, race.judging, ACCURACY)
    return table_of(settings, race, verdict, ACCURACY)


def test_numbers() -> None:
    baseline, twice, nrs, rpr = table()
    assert baseline["accuracy"] == 0.5 and baseline["accuracy_deviation"] == 0
    assert math.isnan(baseline["difference"])
    assert twice["seconds"] == 3
    assert twice["difference"] == pytest.approx(0.1)
    assert math.isnan(twice["difference_same_cost"])
    # Without the failed one.
    assert (nrs["seeds"], nrs["failed"]) == (3, 1)
    assert nrs["accuracy"] == pytest.approx(0.75)
    assert nrs["accuracy_deviation"] == pytest.approx(0.05 * math.sqrt(2))
    assert nrs["difference"] == pytest.approx(0.25)
    assert nrs["difference_same_cost"] == pytest.approx(0.15)
    assert nrs["width"] == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert (rpr["is_judged"], rpr["seeds"]) == (False, 1)
    assert math.isnan(rpr["difference"])


def test_a_narrow_terminal_gets_blocks_of_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = table()
    result = TuneResult(
        decision="Keep the baseline.",
        best="baseline",
        best_arguments=None,
        best_epochs=1,
        best_model=keras.Model(),
        table=rows,
        runs=[],
        metric="accuracy",
        not_run=[],
        seconds=1.0,
    )
    whole = str(result).split("\n\n")[0].splitlines()
    assert len(whole) == 1 + len(rows)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    *blocks, _, _ = str(result).split("\n\n")
    lines = [block.splitlines() for block in blocks]
    assert len(blocks) > 1 and max(len(line) for of in lines for line in of) <= 60
    names = [row["setting"] for row in rows]
    for of_block in lines:
        starts = zip(of_block[1:], names, strict=True)
        assert all(line.startswith(name) for line, name in starts)
    # All cells, once, but for the names.
    cells = [cell for of in lines for line in of for cell in line.split()]
    whole_cells = [cell for line in whole for cell in line.split()]
    more = (len(blocks) - 1) * [c for n in ["setting", *names] for c in n.split()]
    assert sorted(cells) == sorted([*whole_cells, *more])


def test_differences_to_the_baseline_are_not_to_a_shorter_training() -> None:
    settings = settings_from({"short": {"scheme": "baseline", "epochs": 0.5}, "N": {}})
    values = {"short": 0.2, "baseline": 0.5, "baseline, twice the epochs": 0.6}
    race = Race(settings, ACCURACY, seeds=2, budget=Budget(10))
    race.judging = {
        name: {i: row(value) for i in range(2)}
        for name, value in (values | {"N": 0.7}).items()
    }
    verdict = judge(settings, race.judging, ACCURACY)
    lines = table_of(settings, race, verdict, ACCURACY)
    differences = [line["difference"] for line in lines]
    expected = [-0.3, math.nan, 0.1, 0.2]
    assert differences == pytest.approx(expected, nan_ok=True)
    same_cost = [line["difference_same_cost"] for line in lines]
    assert same_cost == pytest.approx([math.nan] * 3 + [0.1], nan_ok=True)


TEXT = """\
setting                     cost   seeds  accuracy (%)   loss    s     vs baseline    vs same cost
baseline                       1       3  50.00 ± 0.00  0.500  1.0
baseline, twice the epochs     2       3  60.00 ± 0.00  0.400  3.0          +10.00
NRS                            2  2 of 3  75.00 ± 7.07  0.250  1.0  +25.00 ± 63.53  +15.00 ± 63.53
RPR                            1     (1)         40.00  0.600  1.0

Means of validation data, ± standard deviations over seeds; differences ± half their 95 % intervals.
cost: passes through the model in plain trainings, counted. s: seconds of a training.
(1), (2): the number of seeds that chose, and do not judge.
2 of 3: the others failed, with a loss that is not finite.
Not run, for the budget: SAM, slow; ASAM.

Keep the baseline."""  # noqa: E501


def result_of(metric: str) -> TuneResult:
    return TuneResult(
        decision="Keep the baseline.",
        best="baseline",
        best_arguments=None,
        best_epochs=10,
        best_model=keras.Sequential(),
        table=table(),
        runs=[],
        metric=metric,
        not_run=["SAM, slow", "ASAM"],
        seconds=3.0,
    )


def test_text() -> None:
    assert str(result_of("accuracy")) == TEXT


def test_the_metric_that_decides_comes_first_with_deviations() -> None:
    lines = str(result_of("loss")).splitlines()
    assert lines[0].split()[:4] == ["setting", "cost", "seeds", "loss"]
    assert "accuracy (%)" in lines[0]
    assert "0.250 ± 0.071         75.00" in lines[3]
