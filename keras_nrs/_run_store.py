"""Finished runs in one file, so that a stopped experiment goes on where it stopped."""

import json
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text
from keras_nrs._locks import locked

Row = dict[str, Any]


class RunStore:
    """Finished runs in a JSON file, which each new run replaces atomically.

    A file with other settings is kept: the first new run renames it, from `runs.json`
    to `runs.1.json`. Or it is an error.

    Args:
        path: Path of the file.
        key: Names of the values that identify a run.
        settings: Settings that all runs share.
        check_row: Takes a finished run, and raises an error that says what is wrong
            with it.
        renames: Whether a file with other settings is renamed, and no error.

    Attributes:
        rows: The finished runs with these settings, in the order of the file.

    Raises:
        DamagedFileError: if the file has another format, or a run twice.
        ValueError: if it has other settings, without `renames`.
    """

    def __init__(
        self,
        path: Path,
        key: Sequence[str],
        settings: Row | None = None,
        *,
        check_row: Callable[[Row], object] = expect_object,
        renames: bool = True,
    ) -> None:
        self.path, self._key, self._settings = path, tuple(key), settings
        self._check_row, self._renames = check_row, renames
        self._load()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which this process alone adds runs, to those now in the file.

        Raises:
            InUseError: if another process is in it.
        """
        with locked(self.path.parent, f".{self.path.stem}.lock"):
            self._load()
            yield

    def get(self, wanted: Row, run: Callable[[], Row]) -> Row:
        """The run with the key of `wanted`, done now if it is not finished.

        Args:
            wanted: Values that are known before the run, the key among them.
            run: Does the run and returns its measurements.
        """
        key = self._key_of(wanted)
        if key not in self._by_key:
            row = wanted | run()
            self.rows.append(row)
            self._by_key[key] = row
            self._write()
        return self._by_key[key]

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name, "") for name in self._key)

    def _load(self) -> None:
        self._has_other_settings = False
        self.rows: list[Row] = self._read() if self.path.exists() else []
        self._by_key = {self._key_of(row): row for row in self.rows}

    def _read(self) -> list[Row]:
        remedy = "Restore it, or choose another folder."
        content = read_json(self.path, self._check, remedy=remedy)
        self._has_other_settings = content["settings"] != self._settings
        if self._has_other_settings and not self._renames:
            raise self._other_settings(content["settings"] or {})
        return [] if self._has_other_settings else content["runs"]

    def _check(self, content: Any) -> None:
        expect_object(content, runs=list, settings=(dict, type(None)))
        if content["settings"] != self._settings:
            return
        keys = set()
        for row in content["runs"]:
            self._check_row(row)
            key = self._key_of(row)
            if key in keys:
                names = zip(self._key, key, strict=True)
                text = ", ".join(f"{name}={value!r}" for name, value in names)
                raise ValueError(f"it has the run {text} twice")
            keys.add(key)

    def _other_settings(self, found: Row) -> ValueError:
        own = self._settings or {}
        names = [n for n in own | found if own.get(n) != found.get(n)]
        return ValueError(
            f"The folder {str(self.path.parent)!r} has runs of another call, whose "
            f"{' and '.join(names)} differ. Choose another folder, or delete it."
        )

    def _write(self) -> None:
        if self._has_other_settings:
            numbered = (self.path.with_suffix(f".{i}.json") for i in count(1))
            os.replace(self.path, next(p for p in numbered if not p.exists()))
            self._has_other_settings = False
        content = {"settings": self._settings, "runs": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
