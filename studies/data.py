"""Data sets of the study: a pool for training and validation, and a fixed test set."""

from collections.abc import Iterator
from collections.abc import Sequence
from functools import cache
from typing import Any
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from keras_nrs._fashion_mnist import load_fashion_mnist
from studies.mnist1d import load_mnist1d

Array = NDArray[Any]

NUM_CLASSES = 10
CLASSES = tuple(range(NUM_CLASSES))
# Sequences of the test set, and of the pool.
MNIST1D = {"mnist1d": (10_000, 10_000), "smoke": (200, 300)}
# Mean and deviation of the pixels of Fashion-MNIST's training images, in [0, 1].
FASHION_MEAN, FASHION_DEVIATION = 0.286, 0.353
MAX_SHIFT = 2


class Samples(NamedTuple):
    """Inputs of shape `(n, ...)` in float32, and integer labels of shape `(n,)`."""

    x: Array
    y: Array


@cache
def pool_and_test(data: str) -> tuple[Samples, Samples]:
    """What training and validation samples are drawn from, and the test set.

    Args:
        data: `"mnist1d"`, `"fashion"`, or `"smoke"`, some sequences for tests.
    """
    if data in MNIST1D:
        n = MNIST1D[data][0]
        x, y = load_mnist1d(sum(MNIST1D[data]), seed=0)
        return Samples(x[n:], y[n:]), Samples(x[:n], y[:n])
    (x, y), (x_test, y_test) = load_fashion_mnist()
    return Samples(_scaled(x), y), Samples(_scaled(x_test), y_test)


def _scaled(images: Array) -> Array:
    x = (images[..., None] / 255 - FASHION_MEAN) / FASHION_DEVIATION
    return x.astype("float32")


@cache
def given_labels(data: str, noise: str) -> Array:
    """The labels of the pool that training and validation are given.

    A sample has the same wrong label for all seeds.

    Args:
        data: As for `pool_and_test()`.
        noise: `""` for the true labels; `"flipped40"` takes 40 % of each class for the
            next class; `"random60"` takes 60 % for other classes at random.
    """
    y = pool_and_test(data)[0].y.astype("int64")
    if not noise:
        return y
    rng = np.random.default_rng(0)
    share = {"flipped40": 0.4, "random60": 0.6}[noise]
    wrong = y.copy()
    for label in range(NUM_CLASSES):
        of_class = rng.permutation(np.flatnonzero(y == label))
        chosen = of_class[: round(share * len(of_class))]
        is_random = noise == "random60"
        steps = rng.integers(1, NUM_CLASSES, len(chosen)) if is_random else 1
        wrong[chosen] = (label + steps) % NUM_CLASSES
    return wrong


def draw(
    data: str,
    noise: str,
    *,
    train: int,
    validation: int,
    seed: int,
    classes: Sequence[int] = CLASSES,
) -> tuple[Samples, Samples]:
    """Disjoint training and validation samples, each class with its share.

    Args:
        data: As for `pool_and_test()`.
        noise: As for `given_labels()`.
        train: Number of training samples.
        validation: Number of validation samples.
        seed: What the drawn samples depend on.
        classes: The classes that they are of, numbered anew.
    """
    true = pool_and_test(data)[0].y
    pool = Samples(pool_and_test(data)[0].x, given_labels(data, noise))
    first, others = train_test_split(
        np.flatnonzero(np.isin(true, classes)),
        train_size=train,
        stratify=true[np.isin(true, classes)],
        random_state=seed,
    )
    second, _ = train_test_split(
        others, train_size=validation, stratify=true[others], random_state=seed
    )
    drawn = [Samples(pool.x[chosen], pool.y[chosen]) for chosen in (first, second)]
    return of_classes(drawn[0], classes), of_classes(drawn[1], classes)


def of_classes(samples: Samples, classes: Sequence[int]) -> Samples:
    """The samples of some classes, which are numbered in this order."""
    is_in = np.isin(samples.y, classes)
    numbers = np.full(NUM_CLASSES, -1)
    numbers[list(classes)] = np.arange(len(classes))
    return Samples(samples.x[is_in], numbers[samples.y[is_in]])


def batches(
    samples: Samples,
    *,
    size: int,
    seed: int,
    num_classes: int = NUM_CLASSES,
    is_augmented: bool = False,
) -> Iterator[tuple[Array, Array]]:
    """Endless batches of inputs and labels, in an order that only the seed decides.

    Args:
        samples: The training samples; what no whole batch has left of an epoch is left
            out of it.
        size: Samples in a batch.
        seed: Seed of the order and of the augmentation.
        num_classes: Length of a one-hot label.
        is_augmented: Whether to flip images, and to shift them by up to 2 pixels.
    """
    rng = np.random.default_rng(seed)
    x, y = samples.x, np.eye(num_classes, dtype="float32")[samples.y]
    while True:
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            batch = order[start : start + size]
            yield augmented(x[batch], rng) if is_augmented else x[batch], y[batch]


def augmented(images: Array, rng: np.random.Generator) -> Array:
    """Images of shape `(n, height, width, 1)`, shifted, and half of them flipped."""
    n, height, width, _ = images.shape
    pad = (MAX_SHIFT, MAX_SHIFT)
    padded = np.pad(
        images, ((0, 0), pad, pad, (0, 0)), constant_values=float(images.min())
    )
    top, left = rng.integers(0, 2 * MAX_SHIFT + 1, (2, n, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    is_flipped = rng.random(n) < 0.5
    columns[is_flipped] = columns[is_flipped, ::-1]
    shifted: Array = padded[
        np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return shifted
