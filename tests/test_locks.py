"""One writer for a folder: on this host, on others, and after the holder's death."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keras_nrs import _locks
from keras_nrs._locks import InUseError
from keras_nrs._locks import Lock
from keras_nrs._locks import locked
from tests.support.processes import FORKS

pytestmark = pytest.mark.only_torch  # Nothing here depends on the backend.


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and waits in hundredths of a second."""
    monkeypatch.setattr(_locks, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(_locks, "DEAD_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(_locks, "_POLL_SECONDS", 0.01)


@pytest.fixture
def no_system_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""
    monkeypatch.setattr(_locks, "_lock", lambda file: False)


def hold(folder: Path, held: Any, end: Any) -> None:
    with locked(folder):
        held.set()
        end.wait(60)


def holder(folder: Path) -> tuple[Any, Callable[[], None]]:
    """A process that holds the lock, and what lets it end."""
    held, end = FORKS.Event(), FORKS.Event()
    process = FORKS.Process(target=hold, args=(folder, held, end), daemon=True)
    process.start()
    assert held.wait(60)
    return process, end.set


def test_the_holder_is_named_and_the_lock_freed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    process, let_end = holder(folder)
    with (
        pytest.raises(InUseError, match=rf"folder' is in use by process {process.pid}"),
        locked(folder),
    ):
        pass
    let_end()
    process.join()
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not folder.exists()
    assert folder.parent.exists()


def test_the_lock_of_the_next_holder_stays(tmp_path: Path) -> None:
    """In a folder that the last one deleted, as the end of a backup does."""
    folder = tmp_path / "backup"
    with locked(folder):
        shutil.rmtree(folder)
        process, let_end = holder(folder)
    with pytest.raises(InUseError, match=str(process.pid)), locked(folder):
        pass
    let_end()
    process.join()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("system_locks", [True, False])
def test_a_dead_holder_of_this_host(
    tmp_path: Path, system_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = holder(tmp_path)
    if not system_locks:
        monkeypatch.setattr(_locks, "_lock", lambda file: False)
        with pytest.raises(InUseError, match=str(process.pid)), locked(tmp_path):
            pass
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def of_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_locks, "_machine", lambda: "another")
    monkeypatch.setattr(_locks.platform, "node", lambda: "other-host")


@pytest.mark.usefixtures("soon", "no_system_locks")
def test_a_living_holder_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        of_another_host(patched)
        lock = Lock(tmp_path / ".lock")
    try:
        with pytest.raises(InUseError, match="on host 'other-host'"), locked(tmp_path):
            pass
    finally:
        lock.release()
    assert "Waiting for up to" in capsys.readouterr().err


@pytest.mark.usefixtures("soon", "no_system_locks")
def test_a_holder_of_another_host_that_ends_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_locks, "BEAT_SECONDS", 60.0)
    with monkeypatch.context() as patched:
        of_another_host(patched)
        lock = Lock(tmp_path / ".lock")
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            lock.release()

    monkeypatch.setattr(_locks.time, "sleep", pause)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("system_locks", [True, False])
def test_a_dead_holder_of_another_host(
    tmp_path: Path, system_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat stays the same for the time that this host measures."""
    if not system_locks:
        monkeypatch.setattr(_locks, "_lock", lambda file: False)
    record = {"process": os.getpid(), "host": "x", "machine": "y", "id": "z", "beat": 7}
    (tmp_path / ".lock").write_text(json.dumps(record))
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began > _locks.DEAD_AFTER_SECONDS
        found = json.loads((tmp_path / ".lock").read_text())
        assert found["process"] == os.getpid()
        assert found["machine"] != "y"


@pytest.mark.usefixtures("soon", "no_system_locks")
def test_a_holder_that_was_stopped_notices_that_it_lost_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path) as lock:
        lock.check()
        record = {"process": 1, "host": "other-host", "machine": "y", "id": "z"}
        with (tmp_path / ".lock").open("r+") as file:
            file.write(json.dumps(record).ljust(_locks._RECORD_SIZE))
        lock._thread.join(10)
        with pytest.raises(InUseError, match="on host 'other-host'"):
            lock.check()
    # It is the other one's.
    assert json.loads((tmp_path / ".lock").read_text()) == record


def test_a_child_of_the_holder_does_not_hold_the_lock(tmp_path: Path) -> None:
    """It may outlive the holder."""
    reader, writer = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("text", ["", "{", "[1]", "x" * 5000])
def test_a_damaged_lock_is_free(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path):
        pass


def test_clocks_that_jump_matter_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: -1e9)
    process, let_end = holder(tmp_path)
    with pytest.raises(InUseError), locked(tmp_path):
        pass
    let_end()
    process.join()


def test_a_disk_that_was_full_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: int, text: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
