"""The checkpoints of a training: the facts from which it goes on."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pandas as pd

from keras_nrs._files import DamagedFileError
from keras_nrs._files import atomic_write
from keras_nrs._files import expect_object
from keras_nrs._files import warn_of_damage
from keras_nrs._files import write_text

Row = dict[str, Any]

# A member that Keras does not read, in the file that it writes.
_MEMBER = "keras_nrs.json"
# The last one, and the one before it in case the last one is damaged.
_KEPT = 2


class Checkpoints:
    """The files `checkpoint-EPOCHS.keras` of a training, and its `history.csv`.

    A checkpoint holds the rows of the history up to it. `history.csv` shows them, and
    may have the row of one epoch more, whose checkpoint was not written. Checkpoints of
    version 0.1.0 have no rows: these are in `history.csv` alone.

    Args:
        folder: Folder of the training.
        epochs: Number of epochs of the whole training.
        check_description: Takes the description of a checkpoint's training, and raises
            an error if it is another one.
    """

    def __init__(
        self, folder: Path, epochs: int, check_description: Callable[[Row], None]
    ) -> None:
        self._folder, self._epochs = folder, epochs
        self._check_description = check_description
        self.history_path = folder / "history.csv"

    def write(self, model: keras.Model, history: list[Row], description: Row) -> None:
        """Write the history and the checkpoint of its last epoch."""
        write_text(self.history_path, _to_csv(history))
        member = {"description": description, "history": history}
        path = self._folder / f"checkpoint-{len(history)}.keras"
        with atomic_write(path) as unfinished:
            model.save(unfinished)
            with zipfile.ZipFile(unfinished, "a") as file:
                file.writestr(_MEMBER, json.dumps(member))
        self._remove(range(len(history) - _KEPT + 1))

    def remove(self) -> None:
        """Remove all checkpoints of the training."""
        self._remove(range(self._epochs + 1))

    def newest(self) -> tuple[Path | None, list[Row]]:
        """The newest checkpoint that is whole, and the history up to it.

        There is a warning of each newer one.

        Raises:
            DamagedFileError: if none of them is whole, or the history in `history.csv`
                is another one.
        """
        paths = self._paths()
        errors = []
        for epoch in sorted(set(paths) & set(range(1, self._epochs + 1)), reverse=True):
            try:
                history = self._history_of(paths[epoch], epoch)
            except DamagedFileError as error:
                errors.append(error)
                continue
            warn_of_damage(errors, paths[epoch])
            if history is None:
                return paths[epoch], self.read_history(epoch)
            self._check_history(history)
            return paths[epoch], history
        if errors:
            raise errors[0]
        return None, []

    def read_history(self, epochs: int) -> list[Row]:
        """The first rows of `history.csv`."""
        remedy = "Restore it, or delete the folder to train again."
        try:
            data = self.history_path.read_bytes()
            # Pandas rounds floats that it reads, but not texts that it converts.
            rows = pd.read_csv(io.BytesIO(data), nrows=epochs, dtype=str).astype(float)
            if rows["epoch"].tolist() != list(range(epochs)):
                raise ValueError(f"it must have the rows of {epochs} epochs")
        except Exception as error:
            raise DamagedFileError(self.history_path, error, remedy) from error
        rows = rows.astype({"epoch": int})
        return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]

    def _history_of(self, path: Path, epoch: int) -> list[Row] | None:
        """The rows in a checkpoint, `None` in one of version 0.1.0.

        Raises:
            DamagedFileError: if any of its bytes is not as it was written.
        """
        data = path.open("rb")
        try:
            with data, zipfile.ZipFile(data) as file:
                damaged = file.testzip()
                if damaged is not None:
                    raise ValueError(f"{damaged!r} in it has another checksum")
                names = file.namelist()
                member = json.loads(file.read(_MEMBER)) if _MEMBER in names else None
            if member is None:
                return None
            expect_object(member, description=dict, history=list)
            self._check_description(member["description"])
            history: list[Row] = member["history"]
            if [row["epoch"] for row in history] != list(range(epoch)):
                raise ValueError(f"it is of epoch {len(history)}")
        except Exception as error:
            remedy = "Delete it: the training goes on from an older one, or begins."
            raise DamagedFileError(path, error, remedy) from error
        return history

    def _check_history(self, history: list[Row]) -> None:
        if not self.history_path.exists():
            write_text(self.history_path, _to_csv(history))
        text = self.history_path.read_bytes().decode("utf-8", "replace")
        if not text.replace("\r\n", "\n").startswith(_to_csv(history)):
            raise DamagedFileError(
                self.history_path,
                f"its rows are not those of the {len(history)} epochs so far",
                "Delete it, and it is written again.",
            )

    def _paths(self) -> dict[int, Path]:
        """By number of epochs. Files with other names are not the training's."""
        found = {}
        for path in self._folder.glob("checkpoint-*.keras"):
            if match := re.fullmatch(r"checkpoint-(\d{1,9})", path.stem):
                found[int(match[1])] = path
        return found

    def _remove(self, epochs: range) -> None:
        for epoch, path in self._paths().items():
            if epoch in epochs:
                path.unlink(missing_ok=True)


def _to_csv(history: list[Row]) -> str:
    return pd.DataFrame(history).to_csv(index=False, na_rep="nan")
