"""The store: it grows, and no line is lost or counted twice."""

from pathlib import Path

import pytest

from keras_nrs._files import DamagedFileError
from studies.store import Run
from studies.store import Store

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def run(seed: int, **settings: float) -> Run:
    return Run(task="t", arm="a", stage="choice", settings=settings, seed=seed)


def add(folder: Path, *runs: Run) -> None:
    store = Store(folder)
    for added in runs:
        store.add(added, {"measured": {"seed": added.seed}, "seconds": 1.0})


def test_a_second_store_has_the_runs_of_the_first(tmp_path: Path) -> None:
    add(tmp_path, run(0, eps=0.3), run(1, eps=0.3))
    add(tmp_path, run(0, eps=0.1))
    store = Store(tmp_path)
    assert len(store.rows("t")) == 3
    assert store.get(run(1, eps=0.3)) == {"seed": 1}
    assert store.get(run(1, eps=0.1)) is None
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 3


def test_other_protocols_are_other_runs(tmp_path: Path) -> None:
    other = Run(task="t", arm="a", stage="choice", settings={}, seed=0, protocol=0)
    add(tmp_path, other)
    store = Store(tmp_path)
    assert store.get(run(0)) is None
    assert store.rows("t") == []


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_done_again(tmp_path: Path, cut: int) -> None:
    add(tmp_path, run(0), run(1))
    path = tmp_path / "t.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert Store(tmp_path).get(run(1)) is None
    add(tmp_path, run(1))
    assert len(path.read_text().splitlines()) == 2
    assert Store(tmp_path).get(run(1)) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_run_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    add(tmp_path, run(0))
    path = tmp_path / "t.jsonl"
    path.write_text(2 * path.read_text())
    assert len(Store(tmp_path).rows("t")) == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"measured": {}, "settings": {}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    add(tmp_path, run(0))
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DamagedFileError, match=r"t\.jsonl.*line 2"):
        Store(tmp_path)
