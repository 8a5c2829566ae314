"""The tasks of the study, in order of priority: PROTOCOL.md says why these."""

from dataclasses import dataclass
from typing import Any

import keras

from studies import data
from studies.data import CLASSES
from studies.data import Samples
from studies.networks import NETWORKS
from studies.networks import with_dropout

Settings = dict[str, Any]

_SGD_RATES = {"mnist1d": (0.2, 0.3, 0.4), "fashion": (0.1, 0.2, 0.4)}
_SGD_DECAYS = {"mnist1d": (3e-3, 1e-2), "fashion": (0.04, 0.1)}
_ADAMW_RATES, _ADAMW_DECAYS = (1e-3, 2e-3, 4e-3), (0.03, 0.3)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a network, a number of training samples and an optimizer.

    Attributes:
        name: Name of its file of runs.
        data: As for `data.pool_and_test()`.
        network: One of `NETWORKS`.
        train: Number of training samples, drawn anew for each seed.
        validation: Number of validation samples, likewise.
        epochs: Passes over the training samples.
        batch_size: Samples in a batch.
        optimizer: `"sgd"` (momentum 0.9) or `"adamw"`.
        noise: Kind of wrong labels, as for `data.given_labels()`.
        is_augmented: Whether images are flipped and shifted.
        is_main: Whether it comes before the others.
        is_on_demand: Whether it runs only where it is named.
        learning_rates: What the baseline chooses from; by default that of its kind.
        weight_decays: Likewise.
        classes: The classes whose samples it has.
        starts_from: Name of the task whose network it starts from, with a new last
            layer.
    """

    name: str
    data: str
    network: str
    train: int
    validation: int = 2000
    epochs: int = 30
    batch_size: int = 64
    optimizer: str = "sgd"
    noise: str = ""
    is_augmented: bool = False
    is_main: bool = False
    is_on_demand: bool = False
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    classes: tuple[int, ...] = CLASSES
    starts_from: str = ""

    def baseline_settings(self) -> list[Settings]:
        """Six pairs of learning rate and weight decay."""
        is_sgd = self.optimizer == "sgd"
        kind = "fashion" if self.data == "fashion" else "mnist1d"
        rates = _SGD_RATES[kind] if is_sgd else _ADAMW_RATES
        decays = _SGD_DECAYS[kind] if is_sgd else _ADAMW_DECAYS
        return [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in self.learning_rates or rates
            for decay in self.weight_decays or decays
        ]

    def training_data(self, seed: int) -> tuple[Samples, Samples]:
        """The training and validation samples of a seed, with the labels given."""
        return data.draw(
            self.data,
            self.noise,
            train=self.train,
            validation=self.validation,
            seed=seed,
            classes=self.classes,
        )

    def test_data(self) -> Samples:
        """The test samples, with true labels: no choice may use them."""
        return data.of_classes(data.pool_and_test(self.data)[1], self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        shape: tuple[int, ...] = data.pool_and_test(self.data)[0].x.shape[1:]
        return shape

    def network_of(self, seed: int, *, dropout: float = 0.0) -> keras.Model:
        """A new network, with the initial weights of a seed."""
        keras.utils.set_random_seed(seed)
        model = NETWORKS[self.network](self.input_shape, len(self.classes))
        return with_dropout(model, dropout) if dropout else model


def _mnist1d(train: int, epochs: int, **arguments: Any) -> Task:
    return Task(
        name=f"mnist1d-cnn-{train}{arguments.pop('ending', '')}",
        data="mnist1d",
        network="cnn",
        train=train,
        validation=1000,
        epochs=epochs,
        batch_size=50,
        **arguments,
    )


def _fashion(network: str, train: int, **arguments: Any) -> Task:
    return Task(
        name=f"fashion-{network}-{train}{arguments.pop('ending', '')}",
        data="fashion",
        network=network,
        train=train,
        **arguments,
    )


def _of_gpu(network: str, train: int, epochs: int) -> Task:
    return _fashion(
        network,
        train,
        epochs=epochs,
        batch_size=128,
        optimizer="adamw" if network == "vit-ti" else "sgd",
        is_augmented=True,
        is_on_demand=True,
    )


_ALL = [
    _mnist1d(1000, 150, is_main=True),
    _fashion("resnet8", 2000, is_main=True),
    _fashion("resnet8", 2000, ending="-flipped40", noise="flipped40", is_main=True),
    _fashion(
        "mlp",
        3000,
        optimizer="adamw",
        is_main=True,
        learning_rates=(5e-4, 1e-3, 2e-3),
    ),
    _fashion(
        "vit",
        2000,
        epochs=40,
        optimizer="adamw",
        is_main=True,
        weight_decays=(0.3, 1.0),
    ),
    _mnist1d(300, 400),
    _mnist1d(4000, 60),
    _mnist1d(1000, 150, optimizer="adamw", ending="-adamw"),
    _fashion("resnet8", 1000, epochs=50),
    _fashion("resnet8", 5000, epochs=20),
    _fashion("resnet8", 2000, epochs=60, is_augmented=True, ending="-augmented"),
    _fashion("resnet8", 2000, noise="random60", ending="-random60"),
    # Shirts and T-shirts, the two classes that are confused most.
    _fashion(
        "resnet8",
        100,
        ending="-finetuned",
        epochs=40,
        batch_size=20,
        validation=1000,
        classes=(0, 6),
        starts_from="fashion-resnet8-8000-other-classes",
        learning_rates=(0.01, 0.03, 0.1),
        weight_decays=(0.01, 0.1),
    ),
    _fashion(
        "resnet8",
        8000,
        ending="-other-classes",
        epochs=15,
        classes=(1, 2, 3, 4, 5, 7, 8, 9),
        is_on_demand=True,
    ),
    _of_gpu("resnet18", 10_000, 60),
    _of_gpu("resnet18", 60_000, 30),
    _of_gpu("wrn28-10", 10_000, 60),
    _of_gpu("wrn28-10", 60_000, 30),
    _of_gpu("vit-ti", 10_000, 60),
    _of_gpu("vit-ti", 60_000, 30),
    # Over in a second: for tests of the engine.
    Task(
        name="smoke",
        data="smoke",
        network="cnn",
        train=60,
        validation=40,
        epochs=2,
        batch_size=20,
        noise="flipped40",
        is_on_demand=True,
    ),
]
TASKS = {task.name: task for task in _ALL}
