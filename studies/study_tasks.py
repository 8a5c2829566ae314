"""The tasks of the study: data that need no download, and a small network for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split

from keras_nrs import models
from keras_nrs._digits import load_digits
from keras_nrs.experiments import demo

Array = NDArray[Any]

# All seeds share the test split: whoever chooses settings must not have seen it.
TEST_SPLIT_SEED = 0


class Samples(NamedTuple):
    """Inputs of shape `(n, ...)` and integer labels of shape `(n,)`."""

    x: Array
    y: Array


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a network and a number of training samples.

    Attributes:
        data: One of `DATA`.
        network: One of `NETWORKS`.
        train_samples: Number of training samples, drawn anew for each seed.
        validation_samples: Number of validation samples, for choosing settings.
        test_samples: Number of test samples, the same for all seeds.
        is_held_out: Whether rules are tested on this task, or made from it.
    """

    data: str
    network: str
    train_samples: int
    validation_samples: int
    test_samples: int
    is_held_out: bool = False

    @property
    def name(self) -> str:
        """Data, network and number of training samples, as in the file's name."""
        return f"{self.data}-{self.network}-{self.train_samples}"

    def training_data(self, seed: int) -> tuple[Samples, Samples]:
        """The training and validation samples of a seed, disjoint and stratified."""
        pool, _ = self._pool_and_test()
        x, x_left, y, y_left = train_test_split(
            *pool, train_size=self.train_samples, stratify=pool.y, random_state=seed
        )
        x_validation, _, y_validation, _ = _split(
            Samples(x_left, y_left), self.validation_samples, seed
        )
        return Samples(x, y), Samples(x_validation, y_validation)

    def test_data(self) -> Samples:
        """The test samples, which choices must not use."""
        return self._pool_and_test()[1]

    def build(self) -> keras.Model:
        """A new network, whose initial weights follow Keras's global seed."""
        x, y = _data(self.data)
        return NETWORKS[self.network](x.shape[1:], int(y.max()) + 1)

    def _pool_and_test(self) -> tuple[Samples, Samples]:
        x_test, x, y_test, y = _split(
            _data(self.data), self.test_samples, TEST_SPLIT_SEED
        )
        if x.ndim == 2:
            # Columns of a table: mean 0 and deviation 1 without the test samples.
            mean, deviation = x.mean(axis=0), x.std(axis=0)
            x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
        return Samples(x, y), Samples(x_test, y_test)


def _split(samples: Samples, first: int, seed: int) -> list[Array]:
    """x and y in two stratified parts, of which the first has `first` samples."""
    parts: list[Array] = train_test_split(
        *samples, train_size=first, stratify=samples.y, random_state=seed
    )
    return parts


def _digits() -> Samples:
    """1,797 images of 8 x 8 in [0, 1] and 10 classes."""
    return Samples(*load_digits())


def _wine() -> Samples:
    """178 rows of 13 numbers and 3 classes."""
    return Samples(*datasets.load_wine(return_X_y=True))


def _cancer() -> Samples:
    """569 rows of 30 numbers and 2 classes."""
    return Samples(*datasets.load_breast_cancer(return_X_y=True))


def _sequences(classes: int = 10, samples: int = 3000, length: int = 40) -> Samples:
    """Random smooth templates, shifted, scaled, with correlated noise added."""
    rng = np.random.default_rng(0)

    def smooth(noise: Array) -> Array:
        kernel = np.hanning(9)[1:-1]
        rows = [np.convolve(row, kernel / kernel.sum(), mode="same") for row in noise]
        return np.array(rows)

    templates = smooth(rng.normal(size=(classes, length)))
    y = rng.integers(classes, size=samples)
    shifts = rng.integers(-6, 7, size=samples)
    x = np.array([np.roll(templates[k], s) for k, s in zip(y, shifts, strict=True)])
    x *= rng.uniform(0.5, 1.5, size=(samples, 1))
    x += 0.7 * smooth(rng.normal(size=x.shape))
    return Samples(x[..., None].astype("float32"), y)


DATA: dict[str, Callable[[], Samples]] = {
    "digits": _digits,
    "wine": _wine,
    "cancer": _cancer,
    "sequences": _sequences,
}


@cache
def _data(name: str) -> Samples:
    x, y = DATA[name]()
    return Samples(x.astype("float32"), y.astype("int32"))


def _mlp(input_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    """Two hidden layers of 64 units."""
    hidden = [
        layers.Dense(64, activation="relu", kernel_initializer="he_normal")
        for _ in range(2)
    ]
    inputs = [keras.Input(input_shape), layers.Flatten()]
    return keras.Sequential([*inputs, *hidden, layers.Dense(num_classes)])


def _vit(input_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    """Two blocks of 48 units and 3 heads on patches of 2 x 2."""
    return models.vit(input_shape, num_classes, size=(48, 3), patch_size=2, depth=2)


NETWORKS: dict[str, Callable[[tuple[int, ...], int], keras.Model]] = {
    "cnn": demo.small_cnn,
    "vit": _vit,
    "mlp": _mlp,
}

TASKS = [
    *(
        Task(
            data="digits",
            network=network,
            train_samples=n,
            validation_samples=250,
            test_samples=497,
        )
        for n in (50, 100, 300, 1000)
        for network in ("cnn", "vit")
    ),
    *(
        Task(
            data=data,
            network=network,
            train_samples=n,
            validation_samples=validation,
            test_samples=test,
            is_held_out=True,
        )
        for data, network, n, validation, test in (
            ("digits", "mlp", 100, 250, 497),
            ("wine", "mlp", 40, 50, 78),
            ("cancer", "mlp", 60, 200, 269),
            ("sequences", "cnn", 300, 500, 2000),
        )
    ),
]
