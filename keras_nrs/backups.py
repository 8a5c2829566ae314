"""Backups of `keras.callbacks.BackupAndRestore` that no kill tears apart."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from keras_nrs._files import write_text


def make_backups_whole(callbacks: Any, *, is_first_process: bool) -> None:
    """Let each backup among some callbacks be the last one or the new one.

    Keras writes weights and epoch one after the other, into the files of the last
    backup. Of a run that is killed in between, the weights are of one epoch and the
    number is of another, or there is no number that can be read. Here weights have a
    file of their own, which counts once the file with the epoch names it.

    The first of several processes alone writes and deletes.
    """
    for callback in _backups(callbacks):
        if not is_first_process:
            # Reading the variables may take all processes.
            callback._save_model = functools.partial(_join_in_saving, callback)
            callback.delete_checkpoint = False
        elif "://" not in str(callback.backup_dir):
            callback._save_model = functools.partial(_save, callback)
            callback.on_train_end = functools.partial(_delete, callback)
        callback._load_model = functools.partial(_load, callback)


def _backups(callbacks: Any) -> Iterable[Any]:
    callbacks = getattr(callbacks, "callbacks", callbacks)
    kind = keras.callbacks.BackupAndRestore
    return [callback for callback in callbacks if isinstance(callback, kind)]


def _join_in_saving(backup: Any) -> None:
    backup.model.save_weights(backup._weights_path)


def _save(backup: Any) -> None:
    folder = Path(backup.backup_dir)
    epoch, batch = backup._current_epoch, backup._last_batch_seen
    name = f"epoch-{epoch}-batch-{batch}.weights.h5"
    backup.model.save_weights(folder / name)
    found = {"epoch": epoch, "batch": batch, "weights": name}
    write_text(backup._training_metadata_path, json.dumps(found))
    for path in folder.glob("*.weights.h5"):
        if path.name != name:
            path.unlink()


def _load(backup: Any) -> None:
    path = Path(backup._training_metadata_path)
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "weights" not in found:
        # There is none, or Keras wrote it.
        type(backup)._load_model(backup)
        return
    model = backup.model
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(path.with_name(Path(found["weights"]).name))
    model._initial_epoch = found["epoch"]


def _delete(backup: Any, logs: Any = None) -> None:
    if backup.delete_checkpoint:
        # First, so that what is left of a deletion that is killed does not count.
        Path(backup._training_metadata_path).unlink(missing_ok=True)
    type(backup).on_train_end(backup, logs)
