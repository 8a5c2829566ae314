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
    """A temporary path to write to, which replaces `path` at the end of the context.

    Also removes temporary files for `path` that killed processes left on this machine.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".unfinished-{_machine_id()}-"
    unfinished = path.with_name(f"{prefix}{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for leftover in path.parent.glob(f"{prefix}*-{glob.escape(path.name)}"):
        process, _, name = leftover.name.removeprefix(prefix).partition("-")
        if name == path.name and process.isdecimal() and not _is_running(int(process)):
            with suppress(OSError):  # The file may be another user's.
                leftover.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@functools.cache
def _machine_id() -> str:
    """Eight letters for this machine or container, within which process ids differ."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    if os.name != "posix":  # os.kill(process, 0) would interrupt the process there.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # Another user's process, or no process id.
        return True
    return True
