"""Which runs the protocol asks for, and in which order."""

from collections.abc import Iterable
from collections.abc import Iterator
from statistics import mean

from studies.arms import ARMS
from studies.arms import BASELINE
from studies.store import Run
from studies.store import Store
from studies.tasks import TASKS
from studies.tasks import Settings

CHOICE_SEEDS = range(1000, 1003)
TEST_SEEDS = range(10)

Cell = tuple[str, str]


def choice_runs(store: Store, task: str, arm: str) -> dict[int, list[Run]] | None:
    """The runs that choose an arm's settings, by the number of the setting.

    Returns:
        `None` while the baseline, whose settings it takes, has not chosen.
    """
    shared: Settings | None = {}
    if ARMS[arm].choices:
        shared = chosen(store, task, BASELINE)
    if shared is None:
        return None
    return {
        number: [
            Run(task=task, arm=arm, stage="choice", settings=settings, seed=seed)
            for seed in CHOICE_SEEDS
        ]
        for number, settings in enumerate(ARMS[arm].candidates(TASKS[task], shared))
    }


def chosen(store: Store, task: str, arm: str) -> Settings | None:
    """The settings with the best mean validation accuracy; ties: the lower loss.

    Returns:
        `None` while a run is missing.
    """
    runs = choice_runs(store, task, arm)
    if runs is None:
        return None
    if len(runs) == 1:
        return runs[0][0].settings
    scores = []
    for of_setting in runs.values():
        measured = [store.get(run) for run in of_setting]
        if None in measured:
            return None
        accuracy, loss = (
            mean(m[f"validation_{name}"] for m in measured if m)
            for name in ("accuracy", "loss")
        )
        scores.append((accuracy, -loss))
    return runs[scores.index(max(scores))][0].settings


def runs_of(store: Store, task: str, arm: str) -> Iterator[Run]:
    """The runs of a cell that are known so far, finished or not."""
    runs = choice_runs(store, task, arm)
    if runs is not None and len(runs) > 1:
        for of_setting in runs.values():
            yield from of_setting
    settings = chosen(store, task, arm)
    if settings is not None:
        for seed in TEST_SEEDS:
            yield Run(task=task, arm=arm, stage="test", settings=settings, seed=seed)


def number_of_runs(task: str, arm: str) -> int:
    """How many runs a cell has when it is finished."""
    settings = len(ARMS[arm].candidates(TASKS[task], {}))
    choices = settings * len(CHOICE_SEEDS) if settings > 1 else 0
    return choices + len(TEST_SEEDS)


def cells(
    tasks: Iterable[str] | None = None, arms: Iterable[str] | None = None
) -> list[Cell]:
    """Pairs of a task and an arm in order of priority.

    The main arms of the main tasks come first, then other arms of main tasks, then
    other tasks. A task on demand is there only if it is named.
    """
    names = [t for t in TASKS if not TASKS[t].is_on_demand] if tasks is None else tasks
    pairs = [
        (task, arm)
        for task in names
        for arm in (ARMS if arms is None else arms)
        if ARMS[arm].is_available and ARMS[arm].trains(task)
    ]
    # Sorting keeps the order of pairs of equal rank.
    return sorted(
        pairs, key=lambda pair: (not TASKS[pair[0]].is_main, not ARMS[pair[1]].is_main)
    )


def missing(store: Store, of_cells: Iterable[Cell]) -> Iterator[Run]:
    """The runs that could start now, in order of priority."""
    for task, arm in of_cells:
        for run in runs_of(store, task, arm):
            if store.get(run) is None:
                yield run
