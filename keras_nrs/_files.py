"""Files that are never half-written."""

import functools
import glob
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` once it is written.

    What processes that were killed on this machine have left unfinished of the same
    file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".unfinished-{_machine()}-"
    unfinished = path.with_name(f"{prefix}{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for left in path.parent.glob(f"{prefix}*-{glob.escape(path.name)}"):
        process, _, name = left.name.removeprefix(prefix).partition("-")
        if name == path.name and process.isdecimal() and not _is_running(int(process)):
            with suppress(OSError):  # It may be another user's.
                left.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as a whole."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@functools.cache
def _machine() -> str:
    """In eight letters, this machine or container: where processes have numbers."""
    try:
        numbers = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        numbers = 0
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    if os.name != "posix":  # Where asking would interrupt it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # Of another user, or no number of a process.
        return True
    return True
