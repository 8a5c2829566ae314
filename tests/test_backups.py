"""Backups of `BackupAndRestore`, stopped at each of their steps.

`test_interrupts.py` kills processes at random moments. Here a stop is an error.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import backups
from keras_nrs._locks import InUseError
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

EPOCHS = 3


class Killed(BaseException):
    """What stands for a kill."""


def new_model() -> Any:
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, seed=1, compile=False)
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    return model


def fit(model: Any, folder: Path | None, **options: Any) -> list[np.ndarray]:
    x, y = image_data(32)
    own = (
        [] if folder is None else [keras.callbacks.BackupAndRestore(folder, **options)]
    )
    model.fit(
        x, y, batch_size=16, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=own
    )
    return numpy_values(model.variables + model.optimizer.variables)


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
    assert_equal(fit(wrapped(), tmp_path), fit(wrapped(), None))
    assert not tmp_path.exists()


@pytest.mark.matrix
def test_stopped_in_its_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is not taken for a training that has ended."""

    def stop(folder: Any) -> None:
        next(Path(folder).glob("*.weights.h5")).unlink()
        raise Killed

    expected = fit(wrapped(), None)
    with monkeypatch.context() as patch:
        patch.setattr(keras.src.utils.file_utils, "rmtree", stop)
        with pytest.raises(Killed):
            fit(wrapped(), tmp_path)
    assert_equal(fit(wrapped(), tmp_path), expected)


def state(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "keras_nrs.json").read_text())
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.matrix
def test_one_backup_at_a_time_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.weights.h5").write_text("mine")
    fit(wrapped(), tmp_path, delete_checkpoint=False)
    weights = f"epoch-{EPOCHS}-batch-0.weights.h5"
    assert names(tmp_path) == [weights, "keras_nrs.json", "mine.weights.h5"]
    checksum = hashlib.sha256((tmp_path / weights).read_bytes()).hexdigest()
    found = {"epoch": EPOCHS, "batch": 0, "weights": weights, "sha256": checksum}
    assert state(tmp_path) == [found]


@pytest.mark.matrix
def test_a_damaged_backup_has_one_before_it(tmp_path: Path) -> None:
    """With `double_checkpoint`, as in Keras."""
    options = {"double_checkpoint": True, "delete_checkpoint": False}
    fit(wrapped(), tmp_path, **options)
    assert [s["epoch"] for s in state(tmp_path)] == [EPOCHS - 1, EPOCHS]
    (tmp_path / f"epoch-{EPOCHS}-batch-0.weights.h5").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged.*Going on from epoch-2"):
        found = fit(wrapped(), tmp_path, **options)
    assert_equal(found, fit(wrapped(), None))


@pytest.mark.matrix
def test_the_callback_stays_the_users(tmp_path: Path) -> None:
    """It backs up other models in Keras's way afterwards."""
    x, y = image_data(32)
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    before = dict(vars(backup))
    wrapped().fit(x, y, verbose=0, callbacks=backup)
    assert vars(backup) == before
    new_model().fit(x, y, verbose=0, callbacks=backup)
    assert (tmp_path / "latest.weights.h5").exists()


@pytest.mark.matrix
def test_a_subclass_has_its_own_way(tmp_path: Path) -> None:
    saved = []

    class Own(keras.callbacks.BackupAndRestore):
        def _save_model(self) -> None:
            saved.append(self._current_epoch)
            super()._save_model()

    x, y = image_data(32)
    own = Own(tmp_path, delete_checkpoint=False)
    wrapped().fit(x, y, verbose=0, callbacks=[own])
    assert saved == [1]
    assert names(tmp_path) == ["latest.weights.h5", "training_metadata.json"]


@pytest.mark.matrix
def test_a_backup_that_keras_wrote(tmp_path: Path) -> None:
    """Of the same model by an older version of this package."""
    nrs = wrapped()
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    backup.set_model(nrs)
    nrs.optimizer.build(nrs.trainable_variables)
    expected = numpy_values(nrs.variables)
    backup.on_epoch_end(EPOCHS - 1)
    assert (tmp_path / "latest.weights.h5").exists()
    other = wrapped()
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    fit(other, tmp_path)
    assert_equal(numpy_values(other.variables), expected)


@functools.cache
def compiled() -> tuple[Any, list[Any], list[np.ndarray]]:
    """A model, its variables, and their first values."""
    nrs = wrapped()
    nrs.optimizer.build(nrs.trainable_variables)
    variables = [*nrs.variables, *nrs.optimizer.variables]
    return nrs, variables, numpy_values(variables)


def as_new() -> Any:
    """Like a model of another process, but compiled once."""
    nrs, variables, first = compiled()
    for variable, value in zip(variables, first, strict=True):
        variable.assign(value)
    nrs._initial_epoch = None  # `BackupAndRestore` leaves it behind.
    return nrs


def interrupted(folder: Path, epoch: int, batch: int) -> list[list[np.ndarray]]:
    """The weights with which a training goes on, and those when it is stopped."""
    x, y = image_data(32)
    nrs = as_new()
    found: list[list[np.ndarray]] = []

    def note(*_: Any) -> None:
        found.append(numpy_values(nrs.trainable_variables))

    def stop(number: int, logs: Any) -> None:
        if state(folder)[-1]["epoch"] == epoch and number == batch:
            note()
            raise Killed

    watch = keras.callbacks.LambdaCallback(on_epoch_begin=note, on_train_batch_end=stop)
    backup = keras.callbacks.BackupAndRestore(folder, save_freq=1)
    with pytest.raises(Killed):
        nrs.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[backup, watch])
    return [found[0], found[-1]]


def test_backups_within_an_epoch(tmp_path: Path) -> None:
    """Keras then begins the epoch again, with these weights, also a second time."""
    _, stopped = interrupted(tmp_path, epoch=0, batch=1)
    first, stopped_again = interrupted(tmp_path, epoch=1, batch=0)
    assert_equal(first, stopped)
    first, _ = interrupted(tmp_path, epoch=1, batch=1)
    assert_equal(first, stopped_again)


@pytest.mark.only_torch
def test_stopped_in_the_second_backup_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch that begins again comes to the batch of the last backup once more."""

    def stop(*_: Any) -> None:
        raise Killed

    _, stopped = interrupted(tmp_path, epoch=0, batch=0)
    for _ in range(2):
        before = state(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(backups, "write_text", stop)
            first, _ = interrupted(tmp_path, epoch=0, batch=0)
        assert_equal(first, stopped)
        assert state(tmp_path) == before
        first, stopped_again = interrupted(tmp_path, epoch=0, batch=0)
        assert_equal(first, stopped)
        stopped = stopped_again


@pytest.mark.matrix
def test_stopped_after_its_epoch_in_a_later_callback(tmp_path: Path) -> None:
    """Which sees the epoch again, as its file may be of the one before."""
    seen = []

    class Later(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(epoch)
            if len(seen) == EPOCHS:
                raise Killed

    def callbacks() -> list[Any]:
        return [keras.callbacks.BackupAndRestore(tmp_path), Later()]

    x, y = image_data(32)
    with pytest.raises(Killed):
        wrapped().fit(x, y, epochs=EPOCHS, verbose=0, callbacks=callbacks())
    wrapped().fit(x, y, epochs=EPOCHS, verbose=0, callbacks=callbacks())
    assert seen == [*range(EPOCHS), EPOCHS - 1]


def damage(folder: Path, epoch: int = EPOCHS) -> Path:
    """Flip a bit of the weights of an epoch."""
    (name,) = (s["weights"] for s in state(folder) if s["epoch"] == epoch)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


KEPT = {"double_checkpoint": True, "delete_checkpoint": False}


@pytest.mark.only_torch
def test_a_flipped_bit_costs_an_epoch(tmp_path: Path) -> None:
    fit(wrapped(), tmp_path, **KEPT)
    path = damage(tmp_path)
    with pytest.warns(UserWarning, match=rf"{path.name}' is damaged.*checksum"):
        again = fit(wrapped(), tmp_path, **KEPT)
    assert_equal(again, fit(wrapped(), None))
    for epoch in (EPOCHS - 1, EPOCHS):
        path = damage(tmp_path, epoch)
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged.*Delete"):
        fit(wrapped(), tmp_path, **KEPT)


@pytest.mark.only_torch
def test_weights_without_a_layer_cost_an_epoch(tmp_path: Path) -> None:
    fit(wrapped(), tmp_path, **KEPT)
    path = tmp_path / f"epoch-{EPOCHS}-batch-0.weights.h5"
    with h5py.File(path, "r+") as file:
        layers = file.get("base_model", file)
        del layers[next(name for name in layers if name != "vars")]
    # As a version without checksums wrote them.
    states = [{k: s[k] for k in ("epoch", "batch", "weights")} for s in state(tmp_path)]
    (tmp_path / "keras_nrs.json").write_text(json.dumps(states))
    with pytest.warns(UserWarning, match="Going on from epoch-2"):
        again = fit(wrapped(), tmp_path, **KEPT)
    assert_equal(again, fit(wrapped(), None))


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("{}", "holds a dict"),
        ('[{"epoch": 1}]', "lacks 'batch'"),
        ('[{"epoch": 99, "batch": 0, "weights": NAME}]', "for epoch 99"),
        ('[{"epoch": -1, "batch": 0, "weights": NAME}]', "for epoch -1"),
        ('[{"epoch": true, "batch": 0, "weights": NAME}]', "'epoch' is True"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_file_of_states_names_itself(
    tmp_path: Path, text: str, problem: str
) -> None:
    fit(wrapped(), tmp_path, **KEPT)
    name = json.dumps(state(tmp_path)[-1]["weights"])
    (tmp_path / "keras_nrs.json").write_text(text.replace("NAME", name))
    with pytest.raises(ValueError, match=rf"keras_nrs.json' is damaged.*{problem}"):
        fit(wrapped(), tmp_path)


@pytest.mark.only_torch
@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_folder_behind_a_link(tmp_path: Path, is_dangling: bool) -> None:
    """Usual on clusters. The link and its folder stay."""
    target, link = tmp_path / "target", tmp_path / "link"
    if not is_dangling:
        target.mkdir()
    link.symlink_to(target)
    interrupted(link, epoch=1, batch=0)
    assert state(link)[-1]["epoch"] == 1
    found = fit(wrapped(), link, delete_checkpoint=False)
    assert len(state(target)) == 1
    assert state(target)[0]["epoch"] == EPOCHS
    fit(wrapped(), link)
    assert link.is_symlink()
    assert names(target) == []
    assert len(found) == len(fit(wrapped(), link))


@pytest.mark.only_torch
def test_a_folder_has_one_fit(tmp_path: Path) -> None:
    refused = []

    def fit_again(epoch: int, logs: Any) -> None:
        with pytest.raises(InUseError, match=rf"process {os.getpid()} on host"):
            fit(wrapped(), tmp_path)
        refused.append(epoch)

    x, y = image_data(32)
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_end=fit_again),
        keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False),
    ]
    wrapped().fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
    assert refused == [0, 1]
    # Also after an error.
    with pytest.raises(ValueError, match=r"labels|shape|cardinality"):
        wrapped().fit(x, y[:3], verbose=0, callbacks=callbacks[1:])
    fit(wrapped(), tmp_path)
