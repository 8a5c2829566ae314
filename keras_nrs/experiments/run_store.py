"""Finished runs in one file, so that a stopped experiment goes on where it stopped."""

import json
import os
from collections.abc import Callable
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from keras_nrs._files import write_text

Row = dict[str, Any]


class RunStore:
    """Finished runs in a JSON file, which each new run replaces atomically.

    A file with other settings is kept: the first new run renames it, from `runs.json`
    to `runs.1.json`.

    Args:
        path: Path of the file.
        key: Names of the values that identify a run.
        settings: Settings that all runs share.

    Attributes:
        rows: The finished runs with these settings, in the order of the file.

    Raises:
        TypeError, ValueError, KeyError: if the file has another format.
    """

    def __init__(
        self, path: Path, key: Sequence[str], settings: Row | None = None
    ) -> None:
        self.path, self._key, self._settings = path, tuple(key), settings
        self._has_other_settings = False
        self.rows: list[Row] = self._read() if path.exists() else []
        self._by_key = {self._key_of(row): row for row in self.rows}

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

    def _read(self) -> list[Row]:
        content = json.loads(self.path.read_text(encoding="utf-8"))
        rows: list[Row] = content["runs"]
        self._has_other_settings = content["settings"] != self._settings
        return [] if self._has_other_settings else rows

    def _write(self) -> None:
        if self._has_other_settings:
            numbered = (self.path.with_suffix(f".{i}.json") for i in count(1))
            os.replace(self.path, next(p for p in numbered if not p.exists()))
            self._has_other_settings = False
        content = {"settings": self._settings, "runs": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
