"""Which runs come next, and how settings are chosen."""

from collections import Counter
from pathlib import Path

import pytest

from studies import plan
from studies.arms import ARMS
from studies.arms import BASELINE
from studies.arms import DEFAULT
from studies.arms import TWICE
from studies.plan import cells
from studies.plan import chosen
from studies.plan import missing
from studies.store import Row
from studies.store import Run
from studies.store import Store
from studies.tasks import TASKS

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

SMOOTHING = "label smoothing"


def validated(run: Run) -> Row:
    """The learning rate 0.3 is the best, and 0.2 in the label smoothing."""
    rate = run.settings["learning_rate"] == 0.3
    smoothing = run.settings.get("label_smoothing") == 0.2
    accuracy = 0.5 + 0.1 * rate + 0.1 * smoothing
    decay = run.settings["weight_decay"]
    return {"validation_accuracy": accuracy, "validation_loss": decay}


def fill_in_order(store: Store, of_cells: list[plan.Cell]) -> list[Run]:
    """The runs that are done if always the first one that could start is."""
    done: list[Run] = []
    while (run := next(missing(store, of_cells), None)) is not None:
        store.add(run, {"measured": validated(run), "seconds": 2.0})
        done.append(run)
    return done


def test_other_arms_wait_for_the_baseline(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert list(missing(store, [("smoke", SMOOTHING)])) == []
    first = list(missing(store, [("smoke", SMOOTHING), ("smoke", BASELINE)]))
    assert {(run.arm, run.stage) for run in first} == {(BASELINE, "choice")}
    assert [run.seed for run in first] == 6 * [1000, 1001, 1002]


def test_runs_come_in_order_and_a_test_as_soon_as_it_can(tmp_path: Path) -> None:
    of_cells = [("smoke", arm) for arm in (BASELINE, TWICE, SMOOTHING, DEFAULT)]
    done = fill_in_order(Store(tmp_path), of_cells)
    counts = Counter((run.arm, run.stage) for run in done)
    expected = {
        (arm, stage): 10 if stage == "test" else 18
        for _, arm in of_cells
        for stage in ("choice", "test")
        if (arm, stage) != (DEFAULT, "choice")
    }
    assert counts == expected
    assert list(counts) == list(expected)
    assert sum(plan.number_of_runs(*cell) for cell in of_cells) == len(done)
    assert {run.seed for run in done if run.stage == "test"} == set(range(10))


def test_the_best_is_chosen_and_shared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    of_cells = [("smoke", arm) for arm in (BASELINE, SMOOTHING)]
    done = fill_in_order(store, of_cells)
    # Of equal accuracies the lower loss wins.
    best = {"learning_rate": 0.3, "weight_decay": 3e-3}
    assert chosen(store, "smoke", BASELINE) == best
    assert chosen(store, "smoke", SMOOTHING) == best | {"label_smoothing": 0.2}
    for run in done:
        if run.arm == SMOOTHING:
            assert best.items() <= run.settings.items()


def test_nothing_is_chosen_before_all_runs_are_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for run in list(missing(store, [("smoke", BASELINE)]))[1:]:
        store.add(run, {"measured": validated(run), "seconds": 1.0})
    assert chosen(store, "smoke", BASELINE) is None


def test_main_arms_of_main_tasks_come_first() -> None:
    ranks = [(TASKS[t].is_main, ARMS[a].is_main) for t, a in cells()]
    assert ranks == sorted(ranks, reverse=True)
    assert not any(TASKS[task].is_on_demand for task, _ in cells())
    assert cells(["smoke"], [BASELINE]) == [("smoke", BASELINE)]


def test_an_arm_is_planned_for_its_tasks_alone() -> None:
    arm, task = "NRS, samples shared out", "fashion-mlp-3000"
    assert cells(["smoke", task], [arm]) == [(task, arm)]


def test_arms_choose_from_as_many_settings() -> None:
    for name, arm in ARMS.items():
        assert len(arm.candidates(TASKS["smoke"], {})) in (1, 6), name
    for task in TASKS.values():
        assert len(task.baseline_settings()) == 6
