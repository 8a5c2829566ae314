"""Which trainings are done: some seeds choose, other seeds judge."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from keras_nrs.tuning.budget import Budget
from keras_nrs.tuning.race import FIRST_CHOOSING_SEED
from keras_nrs.tuning.race import Race
from keras_nrs.tuning.race import rung_sizes
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import settings_from
from keras_nrs.tuning.verdict import judge
from tests.tuning.made_up import ACCURACY
from tests.tuning.made_up import row

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

PLAIN = ["baseline", "baseline, twice the epochs"]
Done = list[tuple[str, int, bool]]


def raced(
    accuracy: Callable[[Setting, int], float],
    settings: Any = None,
    seeds: int = 3,
    **budget: float,
) -> tuple[Race, Done, list[float]]:
    """A race of settings whose accuracies are given, what was done, the time left."""
    done: Done = []
    left: list[float] = []

    def train(setting: Setting, seed: int, is_judging: bool) -> Any:
        done.append((setting.name, seed, is_judging))
        value = accuracy(setting, seed)
        return row(value, setting, failed=bool(np.isnan(value)))

    race = Race(
        settings_from(settings), ACCURACY, seeds=seeds, budget=Budget(10, **budget)
    )
    race.run(train, lambda setting, seed, found, seconds: left.append(seconds))
    return race, done, left


def steady(**scores: float) -> Callable[[Setting, int], float]:
    """The same accuracy for each seed."""
    return lambda setting, seed: scores.get(setting.name.replace(" ", "_"), 0.5)


FOUR = {name: {"eps": 0.1 * i} for i, name in enumerate("abcd", 1)}


def test_sizes_of_rungs() -> None:
    assert [rung_sizes(n) for n in (1, 2, 3, 4, 8)] == [[], [], [3], [4], [8, 4]]
    assert rung_sizes(9) == [9, 5, 3]


def test_the_better_half_goes_on_and_fresh_seeds_judge() -> None:
    names = [f"{name}{i}" for name in "abcd" for i in (1, 2)]
    settings = {name: {"eps": 0.1 * i} for i, name in enumerate(names)}
    race, done, left = raced(steady(d1=0.9, a2=0.8, c1=0.7, b1=0.6), settings)
    first = FIRST_CHOOSING_SEED
    assert done[:10] == [(n, first, False) for n in [*PLAIN, *settings]]
    four = ["d1", "a2", "c1", "b1"]
    assert done[10:16] == [(n, first + 1, False) for n in [*PLAIN, *four]]
    judged = [*PLAIN, "d1", "a2"]
    assert done[16:] == [(n, seed, True) for seed in range(3) for n in judged]
    assert [setting.name for setting in race.finalists] == ["d1", "a2"]
    assert race.judging.keys() == set(judged)
    assert race.choosing["d1"].keys() == {first, first + 1}
    # Two for each setting, as they cost, and 7 for each round of judging.
    assert left[0] == 2 + 16 + 3 + 8 + 3 * 7
    assert left[-2:] == [2, 0]


def test_two_settings_need_not_be_chosen_from() -> None:
    _, done, _ = raced(steady(), {"a": {}, "b": {"eps": 0.4}}, seeds=2)
    expected = [*PLAIN, "a", "b"]
    assert done == [(n, seed, True) for seed in range(2) for n in expected]


def test_gains_are_over_the_best_plain_training_of_no_higher_cost() -> None:
    """So the better setting of one pass may have the lower accuracy."""
    settings = {"one": {"scheme": "rpr"}, "two": {}, "three": {"eps": 0.3}}
    scores = {"baseline": 0.6, "baseline,_twice_the_epochs": 0.8}
    race, _, _ = raced(steady(**scores, one=0.65, two=0.82, three=0.81), settings)
    gains = {s.name: race.gain(s) for s in race.others}
    assert gains == pytest.approx({"one": 0.05, "two": 0.02, "three": 0.01})
    assert [s.name for s in race.finalists] == ["one", "two"]


def test_a_failed_training_is_the_worst_and_ends_nothing() -> None:
    race, done, _ = raced(steady(a=np.nan, b=0.1, c=np.nan, d=0.2), FOUR)
    assert [s.name for s in race.finalists] == ["d", "b"]
    assert len(done) == 6 + 3 * 4
    race, done, _ = raced(steady(a=np.nan, b=np.nan, c=0.4, d=np.nan), FOUR)
    assert [s.name for s in race.finalists] == ["c"]
    race, done, _ = raced(steady(**dict.fromkeys("abcd", np.nan)), FOUR)
    assert race.finalists == []
    assert done[-1] == (PLAIN[1], 2, True)


def test_a_budget_leaves_half_for_judging() -> None:
    """A round of judging costs 5 with one finalist, 7 with two."""
    # Choosing has 12 of 24: both plain trainings, and 4 settings. What is left, 13,
    # is not enough for 3 rounds of 7, and so one finalist is judged: 2 rounds of 5.
    race, done, left = raced(steady(c=0.9), FOUR, minutes=24 / 60)
    assert sum(not is_judging for *_, is_judging in done) == 6
    assert [s.name for s in race.finalists] == ["c"]
    assert [seed for name, seed, judging in done if judging and name == "c"] == [0, 1]
    assert left[0] <= 23
    # The same in epochs.
    again = raced(steady(c=0.9), FOUR, epochs=240)[1]
    assert again == done


def test_the_first_setting_is_judged_if_none_could_be_chosen() -> None:
    race, done, _ = raced(steady(), FOUR, minutes=9 / 60)
    assert [name for name, *_ in done] == [*PLAIN, *PLAIN, "a"]
    assert [s.name for s in race.finalists] == ["a"]


@pytest.mark.parametrize("settings", [FOUR, {"a": {}}])
def test_the_baseline_is_trained_in_any_case(settings: Any) -> None:
    _, done, _ = raced(steady(), settings, epochs=10)
    assert done == [("baseline", 0, True)]


def test_methods_that_do_nothing_are_rarely_chosen() -> None:
    """In at most 1 of 20 calls, although the best of eight is looked for."""
    rng = np.random.default_rng(0)
    chosen = {"method": 0, "longer": 0}
    for _ in range(600):
        noise = rng.normal(size=2000)
        race, _, _ = raced(
            lambda s, seed, noise=noise: 0.5 + 0.01 * (noise[seed] + rng.normal()),
            seeds=5,
        )
        entrants = [*race.plain, *race.finalists]
        best = judge(entrants, race.judging, ACCURACY).best
        chosen["method"] += not best.is_plain
        chosen["longer"] += best.is_plain and not best.is_baseline
    # Standard errors here are 0.9 and 0.6 %.
    assert chosen["method"] / 600 < 0.07
    assert chosen["longer"] / 600 < 0.045


def test_a_real_gain_is_found() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        race, _, _ = raced(
            lambda s, seed: rng.normal(0.53 if s.name == "NRS, eps 0.4" else 0.5, 0.01),
            seeds=5,
        )
        entrants = [*race.plain, *race.finalists]
        found += judge(entrants, race.judging, ACCURACY).best.name == "NRS, eps 0.4"
    assert found > 80
