"""Backups of `BackupAndRestore` that stay whole when a run is killed."""

import copy
import json
from pathlib import Path
from typing import Any

import keras

from keras_nrs import keras_internals
from keras_nrs._files import write_text

_STATES_FILE = "keras_nrs.json"
_WEIGHTS_FILES = "epoch-*-batch-*.weights.h5"


class AtomicBackup(keras_internals.OverridableBackup):
    """A backup that is the last one or the new one, whenever the process is killed.

    Keras overwrites the weights of the last backup, and then its epoch. A kill in
    between leaves weights and epoch that do not belong together, or half a file. Here
    each backup has a new file of weights, which counts once the file of states names
    it. `EndOfEpoch` starts the backup of an epoch after all other callbacks, so that
    their files are up to date as well.
    """

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Nothing: `EndOfEpoch` calls `back_up_epoch()`."""

    def back_up_epoch(self, epoch: int, logs: Any) -> None:
        super().on_epoch_end(epoch, logs)

    @property
    def _folder(self) -> Path:
        return Path(self.backup_dir)

    def _read_states(self) -> list[dict[str, Any]]:
        """The backed up states, the newest last."""
        path = self._folder / _STATES_FILE
        return json.loads(path.read_text("utf-8")) if path.exists() else []

    def write_state(self) -> None:
        name = f"epoch-{self.epoch}-batch-{self.batch}.weights.h5"
        self.model.save_weights(self._folder / name)
        states = [state for state in self._read_states() if state["weights"] != name]
        states = states[-1:] if self.double_checkpoint else []
        states.append({"epoch": self.epoch, "batch": self.batch, "weights": name})
        write_text(self._folder / _STATES_FILE, json.dumps(states))
        for path in self._folder.glob(_WEIGHTS_FILES):
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
        while True:
            state = states.pop()
            try:
                self.model.load_weights(self._folder / Path(state["weights"]).name)
                break
            except OSError:
                if not states:
                    raise
        self.epoch = state["epoch"]
        keras_internals.set_initial_epoch(self.model, self.epoch)

    def on_train_end(self, logs: Any = None) -> None:
        if self.delete_checkpoint:
            # First, so that a deletion that is killed leaves no backup that counts.
            (self._folder / _STATES_FILE).unlink(missing_ok=True)
        super().on_train_end(logs)


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
