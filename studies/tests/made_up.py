"""Stores with runs that were never done."""

from collections.abc import Callable
from collections.abc import Iterable

from studies.plan import missing
from studies.store import Row
from studies.store import Run
from studies.store import Store


def fill(
    store: Store, cells: Iterable[tuple[str, str]], measure: Callable[[Run], Row]
) -> None:
    """Do runs without training until none is missing."""
    cells = list(cells)
    while runs := list(missing(store, cells)):
        for run in runs:
            store.add(run, {"measured": measure(run), "seconds": 2.0})
