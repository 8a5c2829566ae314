"""Files that are never half-written."""

import glob
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` once it is written.

    What processes that were killed on this machine have left unfinished of the same
    file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".unfinished-{platform.node()}-"
    unfinished = path.with_name(f"{prefix}{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    pattern = f"{glob.escape(prefix)}*-{glob.escape(path.name)}"
    for left in path.parent.glob(pattern):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            left.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as a whole."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _is_running(process: int) -> bool:
    if os.name != "posix":  # Where asking would interrupt it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # Of another user.
        return True
    return True
