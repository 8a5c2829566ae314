"""Budgets of time and epochs."""

import pytest

from keras_nrs.tuning.budget import Budget
from keras_nrs.tuning.settings import settings_from
from tests.tuning.made_up import row

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

BASELINE, TWICE, NRS = settings_from({"NRS": {}})


def test_a_time_is_that_of_the_setting_or_of_the_baseline_times_the_cost() -> None:
    budget = Budget(10)
    assert budget.seconds([BASELINE, NRS]) == 0
    budget.spend(BASELINE, row(0.9, seconds=3.0))
    assert budget.seconds([BASELINE, TWICE, NRS]) == 3 + 6 + 6
    for seconds in (9.0, 100.0, 10.0):
        budget.spend(NRS, row(0.9, seconds=seconds))
    assert budget.seconds([NRS]) == 10
    assert budget.spent_seconds == 3 + 9 + 100 + 10


def test_no_training_begins_that_is_not_expected_to_end() -> None:
    budget = Budget(10, minutes=0.2)
    budget.spend(BASELINE, row(0.9, seconds=3.0))
    assert budget.allows([BASELINE, NRS])
    assert not budget.allows([BASELINE, NRS, BASELINE, BASELINE])
    assert budget.allows([BASELINE], share=0.5)
    assert not budget.allows([NRS], share=0.5)
    assert budget.seconds_left([NRS]) == 6
    assert budget.seconds_left([NRS, NRS]) == 9


def test_an_epoch_of_two_passes_counts_as_two() -> None:
    budget = Budget(10, epochs=50)
    budget.spend(NRS, row(0.9, epochs_trained=10))
    budget.spend(TWICE, row(0.9, epochs_trained=7))  # Stopped early.
    assert budget.spent_epochs == 27
    assert budget.allows([NRS]) and budget.allows([TWICE])
    assert not budget.allows([NRS, BASELINE])
