"""Small data sets."""

from typing import Any

import keras
import numpy as np


def image_data(num: int = 64, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images with a class-dependent mean, and their classes."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, classes, num)
    x = rng.normal(size=(num, 6, 6, 1)) + y[:, None, None, None]
    return x.astype("float32"), y.astype("int32")


def generator(x: Any, y: Any) -> Any:
    for start in range(0, len(x), 8):
        yield x[start : start + 8], y[start : start + 8]


def endless_generator(x: Any, y: Any) -> Any:
    while True:
        yield from generator(x, y)


class PyDataset(keras.utils.PyDataset):
    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self._batches = list(generator(x, y))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]


def tf_dataset(x: Any, y: Any) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def data_loader(x: Any, y: Any) -> Any:
    import torch
    from torch.utils import data

    tensors = data.TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
    return data.DataLoader(tensors, batch_size=8)
