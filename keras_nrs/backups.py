"""Backups of `keras.callbacks.BackupAndRestore` that no kill tears apart."""

import copy
import json
from pathlib import Path
from typing import Any

import keras

from keras_nrs._files import write_text

_FILE = "keras_nrs.json"
_WEIGHTS = "epoch-*-batch-*.weights.h5"


class AtomicBackup(keras.callbacks.BackupAndRestore):  # type: ignore[misc]
    """A backup that is the last one or the new one, whenever the process is killed.

    Keras writes weights and epoch one after the other, into the files of the last
    backup. Of a run that is killed in between, the weights are of one epoch and the
    number is of another, or there is no number that can be read. Here weights have a
    file of their own, which counts once the file with the epoch names it. And an epoch
    is backed up once all callbacks have seen its end (`EndOfEpoch`), or those after
    this one, which may write files as well, would miss it.
    """

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Left to `EndOfEpoch`."""

    def back_up_epoch(self, epoch: int, logs: Any) -> None:
        super().on_epoch_end(epoch, logs)

    @property
    def _folder(self) -> Path:
        return Path(self.backup_dir)

    def _states(self) -> list[dict[str, Any]]:
        """What there is to go on from, the newest last."""
        path = self._folder / _FILE
        return json.loads(path.read_text("utf-8")) if path.exists() else []

    def _save_model(self) -> None:
        epoch, batch = self._current_epoch, self._last_batch_seen
        name = f"epoch-{epoch}-batch-{batch}.weights.h5"
        self.model.save_weights(self._folder / name)
        kept = [state for state in self._states() if state["weights"] != name]
        kept = kept[-1:] if self.double_checkpoint else []
        states = [*kept, {"epoch": epoch, "batch": batch, "weights": name}]
        write_text(self._folder / _FILE, json.dumps(states))
        for path in self._folder.glob(_WEIGHTS):
            if path.name not in {state["weights"] for state in states}:
                path.unlink(missing_ok=True)

    def _load_model(self) -> None:
        states = self._states()
        if not states or not self.model.built:
            # There is none, or Keras wrote it, or Keras says what the model lacks.
            super()._load_model()
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
        self._current_epoch = self.model._initial_epoch = state["epoch"]

    def on_train_end(self, logs: Any = None) -> None:
        if self.delete_checkpoint:
            # First, so that what is left of a deletion that is killed does not count.
            (self._folder / _FILE).unlink(missing_ok=True)
        super().on_train_end(logs)


class EndOfEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Backs up an epoch. Behind all other callbacks."""

    def __init__(self, backup: AtomicBackup) -> None:
        super().__init__()
        self._backup = backup

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._backup.back_up_epoch(epoch, logs)


def with_atomic_backups(callbacks: list[Any], *, is_first_process: bool) -> list[Any]:
    """The callbacks, with copies of those of `BackupAndRestore` that back up safely.

    Those of subclasses, and for folders that are not on this machine, stay as they
    are. The first of several processes alone writes and deletes.
    """
    kind = keras.callbacks.BackupAndRestore
    found = []
    for callback in callbacks:
        backup = callback
        if type(callback) is kind and "://" not in str(callback.backup_dir):
            backup = copy.copy(callback)
            backup.__class__ = AtomicBackup
        if isinstance(backup, kind) and not is_first_process:
            backup = copy.copy(backup)
            backup._save_model = lambda backup=backup: (
                # Reading the variables may take all processes. This writes nothing.
                backup.model.save_weights(backup._weights_path)
            )
            backup.delete_checkpoint = False
        found.append(backup)
    ends = [EndOfEpoch(backup) for backup in found if isinstance(backup, AtomicBackup)]
    return [*found, *ends]
