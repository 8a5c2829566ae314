"""The forms of data: each trains as arrays do."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tests.compatibility.way import Way
from tests.support.asserts import assert_equal
from tests.support.data import image_data
from tests.support.networks import cnn

X, Y = image_data(32)


def _trained(way: Way, *data: Any, **kwargs: Any) -> list[np.ndarray]:
    keras.utils.set_random_seed(0)
    trained = way.wrap(cnn(dropout=0.5, seed=1))
    history = way.fit(trained, *data, **kwargs)
    assert "val_loss" in history
    way.predict(trained, X)
    return trained.get_weights()


def _as_arrays(way: Way, make: Callable[[], Any], **kwargs: Any) -> None:
    kwargs = {"batch_size": None, "validation_data": make()} | kwargs
    of_data = _trained(way, make(), **kwargs)
    assert_equal(of_data, _trained(way, X, Y, validation_data=(X, Y)))


def arrays(way: Way) -> None:
    _trained(way, X, Y, shuffle=True, validation_split=0.25)


def tf_data(way: Way) -> None:
    import tensorflow as tf

    _as_arrays(way, lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(8))


class InParts(keras.utils.PyDataset):
    """A `PyDataset` of four batches."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        part = slice(8 * index, 8 * index + 8)
        return X[part], Y[part]


def py_dataset(way: Way) -> None:
    _as_arrays(way, InParts)


def data_loader(way: Way) -> None:
    import torch.utils.data

    def make() -> Any:
        tensors = torch.utils.data.TensorDataset(*map(torch.as_tensor, (X, Y)))
        return torch.utils.data.DataLoader(tensors, batch_size=8)

    _as_arrays(way, make)


def generator(way: Way) -> None:
    def batches() -> Iterator[Any]:
        while True:
            yield from map(InParts().__getitem__, range(4))

    _as_arrays(way, batches, steps_per_epoch=4, validation_steps=4)
