"""One writer at a time for a folder, on one host or on several that share it.

The system locks a file in the folder, and frees it when the process ends in any way.
Where hosts share a folder, its locks may hold on each host alone. So the file names its
holder, who also counts in it: a count of another host that stays the same is a dead
holder's. Clocks of hosts differ, so each observer measures the time by its own.
"""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any

from keras_nrs._files import is_running

try:
    import fcntl
except ModuleNotFoundError:  # Windows.
    fcntl = None  # type: ignore[assignment]

BEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 300.0
_POLL_SECONDS = 1.0
# Longer than the name of any host, so that a record is always written over a whole one.
_RECORD_SIZE = 512

Record = dict[str, Any]


class InUseError(RuntimeError):
    """Another process, or another call in this one, writes to the folder."""


class Lock:
    """The lock of a folder, as `locked()` yields it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record: Record = {
            "process": os.getpid(),
            "host": platform.node(),
            "machine": _machine(),
            "id": uuid.uuid4().hex,
            "beat": 0,
        }
        self._is_lost = False
        self._ended = threading.Event()
        self._file = self._acquire()
        try:
            self._write()
            if not self._has_system_lock:
                # Another process may have written at the same moment.
                time.sleep(_POLL_SECONDS)
                self._beat()
                self.check()
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self)
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise an error if another process has taken over.

        It does so from a process that was stopped for minutes, and then goes on.
        """
        if self._is_lost:
            raise InUseError(_in_use(self.path, _read(self._file)))

    def release(self) -> None:
        """Free the folder, and remove the file."""
        self._ended.set()
        self._thread.join()
        _held.discard(self)
        # The folder may have been deleted, and made again by the next holder.
        if not self._is_lost and self._is_at_path(self._file):
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def close_in_child(self) -> None:
        """Let a fork of this process, which may outlive it, not hold the lock."""
        with suppress(OSError):
            os.close(self._file)

    def _acquire(self) -> int:
        """The locked file, once its last holder is dead."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._has_system_lock = _lock(file)
                is_free = self._is_free(file)
            except BlockingIOError:
                record = _read(file)
                os.close(file)
                raise InUseError(_in_use(self.path, record)) from None
            except BaseException:
                os.close(file)
                raise
            # The last holder may have removed the file after it was opened here.
            if is_free and self._is_at_path(file):
                return file
            os.close(file)

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except OSError:
            return False

    def _is_free(self, file: int) -> bool:
        """Whether the file's holder is dead; false if it has just removed the file."""
        record = _read(file)
        if not record:
            return True
        if record.get("machine") == self._record["machine"]:
            if self._has_system_lock:
                return True
            if os.name == "posix":
                if is_running(int(record["process"])):
                    raise InUseError(_in_use(self.path, record))
                return True
        return self._is_silent(file, record)

    def _is_silent(self, file: int, record: Record) -> bool:
        print(
            f"{self.path.parent} was last used by {_name(record)}. Waiting for up to "
            f"{DEAD_AFTER_SECONDS / 60:.0f} minutes, to see whether it still runs.",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + DEAD_AFTER_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            if not self._is_at_path(file):
                return False
            if _read(file) != record:
                raise InUseError(_in_use(self.path, record))
        return True

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and not self._is_lost:
            with suppress(OSError):  # A full disk frees no lock.
                self._beat()

    def _beat(self) -> None:
        self._is_lost = _read(self._file).get("id") != self._record["id"]
        if not self._is_lost:
            self._record["beat"] += 1
            self._write()

    def _write(self) -> None:
        text = json.dumps(self._record).ljust(_RECORD_SIZE)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, text.encode())


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = ".lock") -> Iterator[Lock]:
    """A context in which no other process is in this context of the folder.

    Args:
        folder: The folder, which is made if it is missing.
        name: Name of the file in it that is locked.

    Raises:
        InUseError: if another process is, on this or another host, or another call in
            this process.
        OSError: if the folder cannot be written to.
    """
    path = Path(folder) / name
    is_new = not path.parent.exists()
    # A link may point to a folder that is gone.
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    lock = Lock(path)
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # It has files.
                path.parent.rmdir()


_held: set[Lock] = set()


def _forget_in_child() -> None:
    for lock in _held:
        lock.close_in_child()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _lock(file: int) -> bool:
    """Lock a file. False if the system has no locks there.

    Raises:
        BlockingIOError: if another process holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _read(file: int) -> Record:
    """The record in a file; empty if there is none yet."""
    os.lseek(file, 0, os.SEEK_SET)
    try:
        record = json.loads(os.read(file, _RECORD_SIZE))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _machine() -> str:
    """A name of this run of this machine's system, within which locks hold."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return platform.node()


def _name(record: Record) -> str:
    if not record:
        return "another process"
    return f"process {record.get('process')} on host {record.get('host')!r}"


def _in_use(path: Path, record: Record) -> str:
    return (
        f"The folder {str(path.parent)!r} is in use by {_name(record)}. Wait until "
        "that process has ended, or choose another folder."
    )
