"""Trainings on PyTorch, whole or in one of the processes that train together."""

import json
from typing import Any

import keras
import numpy as np

import keras_nrs
from tests.support.data import image_data
from tests.support.networks import cnn

BATCH_SIZE = 16
# Options of `wrap()`, and whether two groups in one process compute the same.
OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"scheme": "sam", "eps": 0.05}, True),
    ({"scheme": "sam", "eps": 0.05, "sync_perturbation": True}, True),
    ({"scheme": "rpr", "perturbation": "filterwise", "antithetic": True}, True),
    ({"memory_efficient": True}, True),
    # BatchNorm has the moments of the whole batch in steps without a perturbation.
    ({"interval": 2}, False),
    ({"scheme": "baseline"}, False),
]


def share(index: int, number: int) -> list[np.ndarray]:
    """The samples of each batch that a process trains on."""
    return [
        np.concatenate([np.split(batch, number)[index] for batch in np.split(a, 4)])
        for a in image_data(4 * BATCH_SIZE)
    ]


def validation_data(index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples that a process validates on: each has another number."""
    x, y = share(index, number)
    return x[index:], y[index:]


def train(options: dict[str, Any], index: int, number: int) -> dict[str, Any]:
    """The history and the weights of a training on a share of each batch."""
    # Weights and seeds of the first process are those of all.
    keras.utils.set_random_seed(index)
    x, y = share(index, number)
    model = cnn(dropout=0.3, penalty=0.01, seed=5)
    nrs = keras_nrs.wrap(model, **options)
    history = nrs.fit(
        x,
        y,
        batch_size=BATCH_SIZE // number,
        epochs=2,
        shuffle=False,
        verbose=0,
        validation_data=validation_data(index, number),
    ).history
    own = nrs.evaluate(x[: 8 * (index + 1)], y[: 8 * (index + 1)], verbose=0)
    return {
        "history": history,
        "evaluate": own,
        "weights": [weight.tolist() for weight in model.get_weights()],
    }


class Stop(keras.callbacks.Callback):
    """Stops a training within the second epoch, or at its end."""

    def __init__(self, within_epoch: bool) -> None:
        super().__init__()
        self._within_epoch, self._epoch = within_epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._within_epoch and (self._epoch, batch) == (1, 1):
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch + 1
        if self._epoch == 2 and not self._within_epoch:
            self.model.stop_training = True


def stopped_epochs(index: int, number: int) -> list[int]:
    """How many of 4 epochs the last process trains, which one process stops."""
    x, y = share(index, number)
    nrs = keras_nrs.wrap(cnn())
    batch_size, counts = BATCH_SIZE // number, []
    for stopper, within_epoch in ((0, True), (number - 1, True), (0, False)):
        callbacks = [Stop(within_epoch)] if index == stopper else []
        history = nrs.fit(
            x, y, batch_size=batch_size, epochs=4, verbose=0, callbacks=callbacks
        )
        assert nrs.stop_training
        counts.append(len(history.epoch))
    return counts


if __name__ == "__main__":
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    results = [train(options, rank, size) for options, _ in OPTIONS]
    print("FOUND", json.dumps([results, stopped_epochs(rank, size)]))
    distributed.destroy_process_group()
