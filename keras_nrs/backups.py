"""Backups of `BackupAndRestore` that stay whole when a run is killed."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from keras_nrs import keras_internals
from keras_nrs._files import DamagedFileError
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import warn_of_damage
from keras_nrs._files import write_text
from keras_nrs._locks import locked

State = dict[str, Any]

_STATES_FILE = "keras_nrs.json"
_WEIGHTS_FILES = "epoch-*-batch-*.weights.h5"
_REMEDY = "Delete the folder of the backup to train again from the first epoch."


class AtomicBackup(keras_internals.OverridableBackup):
    """A backup that is the last one or the new one, whenever the process is killed.

    Keras overwrites the weights of the last backup, and then its epoch. A kill in
    between leaves weights and epoch that do not belong together, or half a file. Here
    each backup has a new file of weights, which counts once the file of states names
    it, with its checksum. `EndOfEpoch` starts the backup of an epoch after all other
    callbacks, so that their files are up to date as well.
    """

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Nothing: `EndOfEpoch` calls `back_up_epoch()`."""

    def back_up_epoch(self, epoch: int, logs: Any) -> None:
        super().on_epoch_end(epoch, logs)

    @property
    def folder(self) -> Path:
        """The folder of the backup."""
        return Path(self.backup_dir)

    def _read_states(self) -> list[State]:
        """The backed up states, the newest last."""
        path = self.folder / _STATES_FILE
        return read_json(path, _check_states, remedy=_REMEDY) if path.exists() else []

    def write_state(self) -> None:
        states = self._read_states()
        used = {state["weights"] for state in states}
        # An epoch that begins again comes to the same batch again.
        names = _weights_names(self.epoch, self.batch)
        name = next(name for name in names if name not in used)
        path = self.folder / name
        self.model.save_weights(path)
        state = {"epoch": self.epoch, "batch": self.batch, "weights": name}
        states = [s for s in states if s["weights"] not in names]
        states = states[-1:] if self.double_checkpoint else []
        states.append(state | {"sha256": _sha256(path)})
        write_text(self.folder / _STATES_FILE, json.dumps(states))
        for path in self.folder.glob(_WEIGHTS_FILES):
            if path.name not in {state["weights"] for state in states}:
                path.unlink(missing_ok=True)

    def restore_state(self) -> None:
        states = self._read_states()
        if not states or not self.model.built:
            # Keras reads a backup of its own, and raises if the model is not built.
            super().restore_state()
            return
        optimizer = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        self.epoch = self._load_newest(states)
        keras_internals.set_initial_epoch(self.model, self.epoch)

    def _load_newest(self, states: list[State]) -> int:
        """Load the newest weights that are whole, and return their epoch."""
        errors: list[DamagedFileError] = []
        for state in reversed(states):
            path = self.folder / state["weights"]
            try:
                if state.get("sha256", "") not in ("", _sha256(path)):
                    raise ValueError("its checksum is another one")
                self.model.load_weights(path)
            except Exception as error:
                errors.append(DamagedFileError(path, error, _REMEDY))
                continue
            warn_of_damage(errors, path)
            return int(state["epoch"])
        raise errors[0]

    def on_train_end(self, logs: Any = None) -> None:
        if not self.delete_checkpoint:
            return
        # First, so that a deletion that is killed leaves no backup that counts.
        (self.folder / _STATES_FILE).unlink(missing_ok=True)
        if not self.folder.is_symlink():
            super().on_train_end(logs)
            return
        # The folder has its place by someone's choice, and stays there, empty.
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


class EndOfEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Backs up an epoch after all other callbacks have seen its end."""

    def __init__(self, backup: AtomicBackup) -> None:
        super().__init__()
        self._backup = backup

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._backup.back_up_epoch(epoch, logs)


def with_atomic_backups(callbacks: list[Any], *, is_first_process: bool) -> list[Any]:
    """The callbacks, with an atomic copy of each `BackupAndRestore`.

    Subclasses, and backups in folders that are not on this machine, stay as they are.
    In a run of several processes only the first one writes and deletes files.
    """
    keras_class = keras.callbacks.BackupAndRestore
    replaced = []
    for callback in callbacks:
        backup = callback
        if type(callback) is keras_class and "://" not in str(callback.backup_dir):
            backup = copy.copy(callback)
            backup.__class__ = AtomicBackup
        if isinstance(backup, keras_class) and not is_first_process:
            # Reading the variables may take all processes, so this one saves as well:
            # save_weights() of an NRSModel writes in the first process alone.
            backup = copy.copy(backup)
            keras_internals.back_up_weights_alone(backup)
            backup.delete_checkpoint = False
        replaced.append(backup)
    atomic = [backup for backup in replaced if isinstance(backup, AtomicBackup)]
    return [*replaced, *map(EndOfEpoch, atomic)]


@contextmanager
def locked_backups(callbacks: list[Any], *, is_first_process: bool) -> Iterator[None]:
    """A context in which no other `fit()` writes to the folders of the backups.

    Raises:
        InUseError: if another one does.
    """
    with ExitStack() as locks:
        for callback in callbacks:
            if isinstance(callback, AtomicBackup) and is_first_process:
                locks.enter_context(locked(callback.folder))
        yield


def _check_states(content: Any) -> None:
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}, not a list")
    for state in content:
        expect_object(state, epoch=int, batch=int, weights=str)
        if state["weights"] not in _weights_names(state["epoch"], state["batch"]):
            raise ValueError(
                f"it names the weights {state['weights']!r} for epoch "
                f"{state['epoch']} and batch {state['batch']}"
            )
        if state["epoch"] < 0:
            raise ValueError(f"its epoch is {state['epoch']}")


def _weights_names(epoch: int, batch: int) -> list[str]:
    """Two names for the weights of a batch, of which one is in use at most."""
    name = f"epoch-{epoch}-batch-{batch}"
    return [f"{name}.weights.h5", f"{name}-again.weights.h5"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
