"""Stores with runs that were never done."""

from collections.abc import Callable
from collections.abc import Iterable

from studies.plan import missing
from studies.store import Row
from studies.store import Run
from studies.store import Store


def fill(
    store: Store, cells: Iterable[tuple[str, str]], measure: Callable[[Run], Row]
) -> list[Run]:
    """Do runs without training until none is missing, and return them in order."""
    done: list[Run] = []
    cells = list(cells)
    while (run := next(missing(store, cells), None)) is not None:
        store.add(run, {"measured": measure(run), "seconds": 2.0})
        done.append(run)
    return done
