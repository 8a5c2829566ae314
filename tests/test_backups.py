"""Backups of `BackupAndRestore`, stopped at each of their steps.

`test_interrupts.py` kills processes at random moments. Here a stop is an error.
"""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import backups
from tests import models

EPOCHS = 3


class Killed(BaseException):
    """What stands for a kill."""


def new_model() -> Any:
    keras.utils.set_random_seed(0)
    model = models.cnn(dropout=0.5, seed=1, compile=False)
    models.compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    return model


def fit(model: Any, folder: Path | None, **options: Any) -> list[np.ndarray]:
    x, y = models.image_data(32)
    own = (
        [] if folder is None else [keras.callbacks.BackupAndRestore(folder, **options)]
    )
    model.fit(
        x, y, batch_size=16, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=own
    )
    return models.numpy_values(model.variables + model.optimizer.variables)


def wrapped() -> Any:
    return keras_nrs.wrap(new_model(), eps=0.3, perturbation="relative", seed=0)


@pytest.mark.only_torch  # Where nothing has to be compiled; no backend matters here.
@pytest.mark.parametrize("write", range(2 * EPOCHS))
def test_stopped_before_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Of weights, or of the file that names them."""
    writes = []

    def stopping(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            if len(writes) == write:
                raise Killed
            writes.append(function)
            function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(backups, "write_text", stopping(backups.write_text))
        save_weights = stopping(keras_nrs.NRSModel.save_weights)
        patch.setattr(keras_nrs.NRSModel, "save_weights", save_weights)
        with pytest.raises(Killed):
            fit(wrapped(), tmp_path)
    models.assert_equal(fit(wrapped(), tmp_path), fit(wrapped(), None))
    assert not tmp_path.exists()


def test_stopped_in_its_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is not taken for a training that has ended."""

    def stop(path: Any) -> None:
        raise Killed

    expected = fit(wrapped(), None)
    with monkeypatch.context() as patch:
        patch.setattr(keras.src.utils.file_utils, "rmtree", stop)
        with pytest.raises(Killed):
            fit(wrapped(), tmp_path)
    models.assert_equal(fit(wrapped(), tmp_path), expected)


def test_one_backup_at_a_time(tmp_path: Path) -> None:
    fit(wrapped(), tmp_path, delete_checkpoint=False)
    weights = f"epoch-{EPOCHS}-batch-0.weights.h5"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [weights, "training_metadata.json"]
    found = json.loads((tmp_path / "training_metadata.json").read_text())
    assert found == {"epoch": EPOCHS, "batch": 0, "weights": weights}


def test_a_backup_that_keras_wrote(tmp_path: Path) -> None:
    """Of the same model by an older version of this package."""
    nrs = wrapped()
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    backup.set_model(nrs)
    nrs.optimizer.build(nrs.trainable_variables)
    expected = models.numpy_values(nrs.variables)
    backup.on_epoch_end(EPOCHS - 1)
    assert (tmp_path / "latest.weights.h5").exists()
    other = wrapped()
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    fit(other, tmp_path)
    models.assert_equal(models.numpy_values(other.variables), expected)


def test_backups_within_an_epoch(tmp_path: Path) -> None:
    """Keras then begins the epoch again, with these weights."""
    x, y = models.image_data(32)
    nrs, other = wrapped(), wrapped()
    first: list[Any] = []

    def stop(batch: int, logs: Any) -> None:
        raise Killed

    def fit_with(model: Any, callback: Any) -> None:
        backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq=1)
        model.fit(x, y, batch_size=16, verbose=0, callbacks=[backup, callback])

    with pytest.raises(Killed):
        fit_with(nrs, keras.callbacks.LambdaCallback(on_train_batch_end=stop))
    begin = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: first.extend(
            models.numpy_values(other.trainable_variables)
        )
    )
    fit_with(other, begin)
    models.assert_equal(first, models.numpy_values(nrs.trainable_variables))
