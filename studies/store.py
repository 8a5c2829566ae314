"""A store that grows: a file for each task, with a line of JSON for each run."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_nrs._files import DamagedFileError
from keras_nrs._files import expect_object
from keras_nrs._files import write_text

PROTOCOL = 1
# The folder of what can be made again: compiled programs, pre-trained networks.
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "keras_nrs_study"
)

Row = dict[str, Any]
Key = str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training that the protocol asks for.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        stage: `"choice"` or `"test"`.
        settings: All settings of the training.
        seed: Seed of samples, initial weights, batches and perturbations.
        protocol: Version of PROTOCOL.md.
    """

    task: str
    arm: str
    stage: str
    settings: dict[str, Any]
    seed: int
    protocol: int = PROTOCOL

    @property
    def key(self) -> Key:
        """What tells runs apart."""
        return json.dumps(asdict(self), sort_keys=True)


class Store:
    """The finished runs in a folder.

    A process that is killed while it writes leaves a torn last line. It is left out,
    and the next line takes its place.

    Args:
        folder: Folder of the files.

    Raises:
        DamagedFileError: if another line than the last is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[Key, Row] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for row in _read(path):
                # After a merge of two branches a run may be there twice: one counts.
                self._rows.setdefault(_run_of(row).key, row)

    def get(self, run: Run) -> Row | None:
        """What was measured in a run, if it is finished."""
        row = self._rows.get(run.key)
        return None if row is None else row["measured"]

    def rows(self, task: str) -> list[Row]:
        """The rows of a task in this protocol."""
        wanted = task, PROTOCOL
        rows = self._rows.values()
        return [row for row in rows if (row["task"], row["protocol"]) == wanted]

    def add(self, run: Run, row: Row) -> None:
        """Write a finished run to the disk.

        Args:
            run: The run.
            row: What was measured, as `measured`, and how.
        """
        row = asdict(run) | row
        path = self.folder / f"{run.task}.jsonl"
        _remove_torn_line(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[run.key] = row


def _run_of(row: Row) -> Run:
    return Run(**{name: row[name] for name in Run.__dataclass_fields__})


def _read(path: Path) -> Iterator[Row]:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
            expect_object(row, measured=dict, settings=dict)
            _run_of(row)
        except (ValueError, KeyError) as error:
            raise DamagedFileError(
                path, f"line {number}: {error!r}", "Remove the line: its run is redone."
            ) from error
        yield row


def _remove_torn_line(path: Path) -> None:
    if not path.exists():
        return
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])
