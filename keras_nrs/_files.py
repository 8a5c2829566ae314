"""Files that are never half-written, and errors that name those that are damaged."""

import functools
import glob
import hashlib
import json
import os
import platform
import stat
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """The content of a file cannot be right.

    Args:
        path: Path of the file.
        problem: What is wrong, or the error that reading it raised.
        remedy: What to do.
    """

    def __init__(
        self, path: str | os.PathLike[str], problem: str | Exception, remedy: str
    ) -> None:
        if isinstance(problem, KeyError):
            problem = f"it lacks {problem}"
        text = " ".join((str(problem) or type(problem).__name__).split())
        end = "" if text.endswith(".") else "."
        self.finding = f"The file {os.fspath(path)!r} is damaged: {text[:400]}{end}"
        super().__init__(f"{self.finding} {remedy}")


def warn_of_damage(errors: Iterable[DamagedFileError], used: Path) -> None:
    """Warn of damaged files, in whose place an older one is used."""
    for error in errors:
        warnings.warn(f"{error.finding} Going on from {used.name}.", stacklevel=3)


def read_json(path: Path, check: Callable[[Any], object], *, remedy: str) -> Any:
    """The content of a JSON file.

    Args:
        path: Path of the file.
        check: Takes the content, and raises an error that says what is wrong with it.
        remedy: What to do about a damaged file.

    Raises:
        DamagedFileError: if it is no JSON, or `check` raises an error.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
        check(content)
    except Exception as error:
        raise DamagedFileError(path, error, remedy) from error
    return content


def expect_object(content: Any, **kinds: type | tuple[type, ...]) -> None:
    """Raise an error unless the content is a dict that has values of these types."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    for name, kind in kinds.items():
        value = content[name]
        is_other_bool = isinstance(value, bool) and kind is not bool
        if is_other_bool or not isinstance(value, kind):
            raise ValueError(f"its {name!r} is {value!r:.100}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` at the end of the context.

    If `path` is a link, it replaces the file that the link points to. The new file has
    the mode, group and owner of the old one. A file that may not be written is an error
    before anything is. Also removes temporary files for `path` that killed processes
    left on this machine.
    """
    path = Path(path)
    if path.exists():
        if not path.is_file():
            # A device or a pipe, which nothing can replace, or a folder by mistake.
            yield path
            return
        with path.open("ab"):
            pass
    # The temporary file ends like the link, not like what it points to.
    name = path.name
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".unfinished-{_machine_id()}-"
    unfinished = path.with_name(f"{prefix}{os.getpid()}-{name}")
    try:
        yield unfinished
        if path.exists():
            _copy_access(path, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for leftover in path.parent.glob(f"{prefix}*-{glob.escape(name)}"):
        process, _, found = leftover.name.removeprefix(prefix).partition("-")
        if found == name and process.isdecimal() and not is_running(int(process)):
            with suppress(OSError):  # The file may be another user's.
                leftover.unlink()


def _copy_access(old: Path, new: Path) -> None:
    """Give a file the group, owner and mode of another, as far as the system lets."""
    status = old.stat()
    if os.name == "posix":
        for user, group in [(-1, status.st_gid), (status.st_uid, -1)]:
            with suppress(OSError):
                os.chown(new, user, group)
    with suppress(OSError):
        os.chmod(new, stat.S_IMODE(status.st_mode))


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


def is_running(process: int) -> bool:
    """Whether there is a process with this number on this machine, or may be."""
    if os.name != "posix":  # os.kill(process, 0) would interrupt the process there.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # Another user's process, or no process id.
        return True
    return True
