"""Across modules: Keras's callbacks and metrics work with a wrapped model."""

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

from tests.support.asserts import assert_equal
from tests.support.keras_trainer import OWN_LOGS
from tests.support.keras_trainer import VALIDATION
from tests.support.keras_trainer import Trained
from tests.support.keras_trainer import X
from tests.support.keras_trainer import Y
from tests.support.keras_trainer import classifier
from tests.support.keras_trainer import fit
from tests.support.matrix import rest
from tests.support.perturbations import FixedPerturbation


def perturbed() -> Any:
    """A shared model in which delta is not 0."""
    trained = _perturbed()
    trained.model.eps = 0.3
    return trained.start()


@functools.cache
def _perturbed() -> Trained:
    keras.utils.set_random_seed(0)
    model = classifier()
    return Trained(model, perturbation=FixedPerturbation(), eps=0.3)


def test_metrics_start_anew_at_each_epoch() -> None:
    """Its own too: an epoch's mean does not know of the epoch before."""
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0

    class NoMoreDelta(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.eps = 0.0

    history = fit(nrs, callbacks=[NoMoreDelta()], shuffle=False)
    assert history["model_divergence"][0] > 1e-3
    # Both passes see the same; they may be rounded differently.
    assert history["model_divergence"][1] == pytest.approx(0, abs=1e-6)
    names = {"accuracy", "largest", "loss", "weighted", "epoch"}
    assert set(history) == names | OWN_LOGS


def test_train_on_batch_gives_the_logs_of_that_batch() -> None:
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0
    nrs.train_on_batch(X[:8], Y[:8])
    second = nrs.train_on_batch(X[8:16], Y[8:16], return_dict=True)
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0
    nrs.train_on_batch(X[16:], Y[16:])
    again = nrs.train_on_batch(X[8:16], Y[8:16], return_dict=True)
    assert {name: float(log) for name, log in second.items()} == again


def backup_and_restore(path: Path, nrs: Any) -> None:
    """Stopped within the second epoch, and begun again there."""

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if int(self.model.optimizer.iterations) == 6:
                raise KeyboardInterrupt

    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(path / "backup", save_freq=2)

    with pytest.raises(KeyboardInterrupt):
        fit(nrs, epochs=3, callbacks=[backup(), Interrupt()])
    perturbed()
    assert fit(nrs, epochs=3, callbacks=[backup()])["epoch"] == [1, 2]
    # Of the first epoch and the first batch of the second.
    assert int(nrs.optimizer.iterations) == 1 + 4 + 6


def csv_logger(path: Path, nrs: Any) -> None:
    history = fit(nrs, callbacks=[keras.callbacks.CSVLogger(path / "log.csv")])
    with (path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= set(history)
    for name in OWN_LOGS:
        assert [float(row[name]) for row in rows] == pytest.approx(history[name])


def early_stopping(path: Path, nrs: Any) -> None:
    """The best epoch is the first, before its weights are spoiled."""
    weights: list[Any] = []

    def spoil(epoch: int, logs: Any = None) -> None:
        weights.append(nrs.get_weights())
        nrs.set_weights([100.0 + 0 * w for w in nrs.get_weights()])

    # In this order: the weights are kept before they are spoiled.
    history = fit(
        nrs,
        epochs=9,
        callbacks=[
            keras.callbacks.EarlyStopping(
                "perturbed_loss", mode="min", patience=2, restore_best_weights=True
            ),
            keras.callbacks.LambdaCallback(on_epoch_end=spoil),
        ],
    )
    assert len(history["loss"]) < 9
    assert nrs.stop_training
    assert np.argmin(history["perturbed_loss"]) == 0


def lambda_callback(path: Path, nrs: Any) -> None:
    logged: list[Any] = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: logged.append(set(logs))
    )
    fit(nrs, callbacks=[callback])
    assert len(logged) == 6
    assert all(logs >= OWN_LOGS for logs in logged)


def learning_rate_scheduler(path: Path, nrs: Any) -> None:
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    history = fit(nrs, callbacks=[schedule])
    assert history["learning_rate"] == pytest.approx([0.01, 0.005])


def checkpoint_of_weights(path: Path, nrs: Any) -> None:
    file = path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(
        file,
        monitor="val_loss",
        save_best_only=True,
        save_weights_only=True,
    )
    fit(nrs, callbacks=[checkpoint], epochs=1, **VALIDATION)
    weights = nrs.get_weights()
    perturbed()
    nrs.load_weights(file)
    assert_equal(nrs.get_weights(), weights)


def checkpoint_of_model(path: Path, nrs: Any) -> None:
    file = path / "{epoch}-{perturbed_loss:.1f}.keras"
    fit(nrs, callbacks=[keras.callbacks.ModelCheckpoint(file)])
    (last,) = path.glob("2-*.keras")
    loaded = keras.saving.load_model(last)
    assert_equal(loaded.get_weights(), nrs.get_weights())
    logs = [m.train_on_batch(X[:8], Y[:8], return_dict=True) for m in (nrs, loaded)]
    assert set(logs[0]) == set(logs[1])


def progress_bar(path: Path, nrs: Any) -> None:
    bar = keras.callbacks.ProgbarLogger()
    fit(nrs, callbacks=[bar], verbose=2)
    assert bar.target == 3


def reduce_lr_on_plateau(path: Path, nrs: Any) -> None:
    callback = keras.callbacks.ReduceLROnPlateau(
        "model_divergence", mode="min", factor=0.1, patience=1, min_delta=1e3
    )
    history = fit(nrs, callbacks=[callback], epochs=3)
    assert history["learning_rate"] == pytest.approx([0.02, 0.02, 0.002])


def remote_monitor(path: Path, nrs: Any) -> None:
    with mock.patch("keras.src.callbacks.remote_monitor.requests") as requests:
        history = fit(nrs, callbacks=[keras.callbacks.RemoteMonitor()], epochs=1)
    ((_, data), _) = requests.post.call_args
    sent = json.loads(data["data"])
    assert sent["perturbed_loss"] == pytest.approx(history["perturbed_loss"][0])


def tensor_board(path: Path, nrs: Any) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    board = keras.callbacks.TensorBoard(path, histogram_freq=1, update_freq=1)
    fit(nrs, callbacks=[board], **VALIDATION)
    events = event_accumulator.EventAccumulator(str(path / "train"))
    events.Reload()
    names = set(events.Tags()["tensors"])
    assert names >= {f"epoch_{name}" for name in OWN_LOGS}


def terminate_on_nan(path: Path, nrs: Any) -> None:
    terminate = keras.callbacks.TerminateOnNaN()
    with_nan = np.where(np.arange(24)[:, None] < 20, X, np.nan)
    with pytest.warns(UserWarning, match="is nan"):
        fit(nrs, x=with_nan, shuffle=False, callbacks=[terminate], epochs=5)
    assert nrs.stop_training
    assert int(nrs.optimizer.iterations) == 1 + 3


CALLBACKS = [
    tensor_board,
    *rest(
        backup_and_restore,
        checkpoint_of_model,
        checkpoint_of_weights,
        csv_logger,
        early_stopping,
        lambda_callback,
        learning_rate_scheduler,
        progress_bar,
        reduce_lr_on_plateau,
        remote_monitor,
        terminate_on_nan,
    ),
]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda f: f.__name__)
def test_callback(callback: Callable[..., None], tmp_path: Path) -> None:
    callback(tmp_path, perturbed())
