"""Several calls, one after the other or killed: no run is lost or done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from keras_nrs._files import is_running
from keras_nrs._locks import InUseError
from keras_nrs._locks import locked
from studies import workers
from studies.__main__ import main
from studies.arms import BASELINE
from studies.store import Row
from studies.store import Run
from studies.store import Store

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

CELLS = [("smoke", BASELINE)]


class InThisProcess:
    """An executor that does each call at once."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[[Run], Row], run: Run) -> Future[Row]:
        future: Future[Row] = Future()
        try:
            future.set_result(function(run))
        except Exception as error:
            future.set_exception(error)
        return future


def timed(run: Run) -> Row:
    measured = {"validation_accuracy": 0.5, "validation_loss": 1.0, "accuracy": 0.5}
    return {"seconds": 60.0, "cpu_seconds": 50.0, "measured": measured}


@pytest.fixture
def _without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(workers, "timed", timed)


def lines(folder: Path) -> list[Row]:
    return [json.loads(s) for s in (folder / "smoke.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("_without_training")
def test_a_second_call_adds_to_the_first(tmp_path: Path) -> None:
    # Runs take a minute each, as it seems: the first call starts as many as it may.
    assert workers.work(tmp_path, CELLS, minutes=0.9, processes=2) == []
    first = lines(tmp_path)
    assert 1 <= len(first) <= 2
    assert workers.work(tmp_path, CELLS, minutes=5, processes=2) == []
    rows = lines(tmp_path)
    assert rows[: len(first)] == first
    assert len(rows) == 28
    assert len(Store(tmp_path).rows("smoke")) == 28
    assert workers.work(tmp_path, CELLS, minutes=5, processes=2) == []
    assert lines(tmp_path) == rows
    for name in ("commit", "has_changes", "backend", "versions", "seconds"):
        assert name in rows[0]


@pytest.mark.usefixtures("_without_training")
def test_an_error_ends_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: Run) -> Row:
        if run.seed == 1001:
            raise ValueError("no memory")
        return timed(run)

    monkeypatch.setattr(workers, "timed", failing)
    errors = workers.work(tmp_path, CELLS, minutes=100, processes=2)
    assert [run.seed for run, _ in errors] == 6 * [1001]
    assert len(lines(tmp_path)) == 12

    def dying(run: Run) -> Row:
        raise BrokenExecutor

    monkeypatch.setattr(workers, "timed", dying)
    with pytest.raises(BrokenExecutor):
        workers.work(tmp_path, CELLS, minutes=100, processes=2)


def test_a_folder_has_one_parent(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InUseError):
        workers.work(tmp_path, CELLS, minutes=1, processes=1)


@pytest.mark.usefixtures("_without_training")
def test_the_list_shows_what_is_done_and_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--folder", str(tmp_path), "--tasks", "smoke", "--arms", BASELINE]
    assert main([*options, "--minutes", "0.9", "--processes", "1"]) == 0
    capsys.readouterr()
    assert main([*options, "SAM", "--list"]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert found[1] == ["smoke", "baseline", "1", "27", "27.0"]
    # Two passes cost twice as much.
    assert found[2] == ["smoke", "SAM", "0", "28", "56.0"]


@pytest.mark.parametrize("option", [["--minutes", "0"], ["--processes", "0"]])
def test_bad_options_are_named(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(option)
    assert f"{option[0]} must be" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_call_loses_no_run_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--folder", str(tmp_path), "--tasks", "smoke", "--arms", BASELINE]
    call = subprocess.Popen(
        [sys.executable, "-m", "studies", *options, "--processes", "2"],
        cwd=workers.ROOT,
        stdout=subprocess.PIPE,
    )
    assert call.stdout is not None
    for _ in range(3):
        call.stdout.readline()
    children = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
    call.send_signal(signal.SIGKILL)
    call.wait()
    call.stdout.close()
    kept = lines(tmp_path)
    assert 3 <= len(kept) < 28
    end = time.monotonic() + 100
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < end
        time.sleep(0.1)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(workers, "timed", timed)
    assert main([*options, "--minutes", "100"]) == 0
    rows = lines(tmp_path)
    assert rows[: len(kept)] == kept
    keys = {json.dumps([r["arm"], r["stage"], r["settings"], r["seed"]]) for r in rows}
    assert len(rows) == len(keys) == 28
