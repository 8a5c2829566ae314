"""Files that are written as a whole."""

import multiprocessing
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from keras_nrs import _files
from keras_nrs._files import DamagedFileError
from keras_nrs._files import atomic_write
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text

NOBODY = 65_534

pytestmark = pytest.mark.only_torch  # Nothing here depends on the backend.


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a [file]"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as unfinished:
        unfinished.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(path.parent) == ["a [file]"]


def ended_process() -> int:
    """The number of a process that is no more."""
    process = multiprocessing.get_context("spawn").Process()
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


def left_by(process: int | str, path: Path, machine: str = "") -> Path:
    machine = machine or _files._machine_id()
    left = path.with_name(f".unfinished-{machine}-{process}-{path.name}")
    left.write_text("left")
    return left


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path, dead = tmp_path / "model-1.keras", ended_process()
    left = left_by(dead, path)
    others = [
        left_by(os.getppid(), path),  # It may be writing.
        left_by(dead, path, machine="0123abcd"),
        left_by(dead, tmp_path / "other-model-1.keras"),
        left_by("x", path),
        left_by("9" * 30, path),
    ]
    folder = path.with_name(f".unfinished-{_files._machine_id()}-{dead}9-{path.name}")
    if not _files.is_running(int(f"{dead}9")):
        folder.mkdir()
    write_text(path, "new")
    assert not left.exists()
    assert all(other.exists() for other in others)
    assert path.read_text() == "new"


def test_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 220)
    write_text(path, "new")
    assert names(tmp_path) == [path.name]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="of POSIX")
def test_a_new_file_has_the_mode_of_open(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "ours", "new")
        (tmp_path / "plain").write_text("new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "ours") == mode(tmp_path / "plain") == 0o640


@pytest.mark.skipif(os.name != "posix", reason="of POSIX")
def test_a_replaced_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.write_text("old")
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = path.stat()
    for kept in (0o600, 0o664, 0o777):
        path.chmod(kept)
        write_text(path, "new")
        assert mode(path) == kept
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


@contextmanager
def not_as_root(folder: Path) -> Iterator[None]:
    """A context in which a folder's owner is this process, and not root."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="of POSIX")
def test_a_protected_file_stays() -> None:
    # Root may write to all files, and nobody else may enter pytest's folders.
    with tempfile.TemporaryDirectory() as folder, not_as_root(Path(folder)):
        path = Path(folder) / "protected"
        path.write_text("old")
        path.chmod(0o444)
        with pytest.raises(PermissionError, match="protected"), atomic_write(path):
            pytest.fail("A long training may come first.")
        assert path.read_text() == "old"
        assert names(Path(folder)) == ["protected"]


@pytest.mark.skipif(os.name != "posix", reason="of POSIX")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, link, folder = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(link, "new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(folder, "new")
    assert names(tmp_path) == ["folder", "link", "pipe"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("[1]", "it holds a list, not an object"),
        ("{}", "it lacks 'seed'"),
        ('{"seed": true}', "its 'seed' is True"),
        ('{"seed": "1"}', "its 'seed' is '1'"),
        ("[" * 100_000, "recursion"),
        ('{"seed": 1', "Expecting ',' delimiter"),
        ("\udcff", "decode"),
    ],
)
def test_a_damaged_file_names_itself(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedFileError) as info:
        read_json(path, partial(expect_object, seed=int), remedy="Delete it.")
    assert str(info.value).startswith(f"The file {str(path)!r} is damaged: ")
    assert problem in str(info.value)
    assert str(info.value).endswith(". Delete it.")
    assert "\n" not in str(info.value)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    write_text(tmp_path / "state.json", '{"seed": 3}')
    content = read_json(
        tmp_path / "state.json", partial(expect_object, seed=int), remedy="Delete it."
    )
    assert content == {"seed": 3}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", expect_object, remedy="Delete it.")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one(tmp_path: Path, is_there: bool) -> None:
    target, link = tmp_path / "disk" / "file", tmp_path / "link.keras"
    if is_there:
        write_text(target, "old")
    link.symlink_to(target)
    with atomic_write(link) as unfinished:
        assert unfinished.parent == target.parent
        assert unfinished.suffix == ".keras"
        unfinished.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert names(tmp_path) + names(target.parent) == ["disk", "link.keras", "file"]
