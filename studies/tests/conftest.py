"""A study that is over in a moment."""

import pytest

from studies import study
from studies import task_runs
from studies.tests.tiny import ARMS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds, four steps, few arms."""
    monkeypatch.setattr(task_runs, "EPOCHS", 2)
    monkeypatch.setattr(task_runs, "STEPS_PER_EPOCH", 2)
    monkeypatch.setattr(task_runs, "CHOICE_SEEDS", range(1000, 1002))
    monkeypatch.setattr(task_runs, "ARMS", ARMS)
    monkeypatch.setattr(study, "TEST_SEEDS", range(2))
    monkeypatch.setattr(study, "ARMS", ARMS)
