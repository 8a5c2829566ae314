"""One run of the study: a training, and what is measured of it."""

import math
import time
import warnings
from typing import Any

import keras
import numpy as np

import keras_nrs
from keras_nrs._files import atomic_write
from studies.cheap_steps import with_cheap_step
from studies.data import Samples
from studies.data import batches
from studies.networks import with_last_layer_penalty
from studies.outcomes import Forward
from studies.outcomes import accuracy
from studies.outcomes import loss
from studies.outcomes import measure
from studies.store import CACHE
from studies.store import PROTOCOL
from studies.store import Run
from studies.tasks import TASKS
from studies.tasks import Settings
from studies.tasks import Task

MOMENTUM = 0.9
# Without clipping, the learning rates at which perturbing pays make runs diverge.
CLIPNORM = 1.0
# A run no better than this share over chance has failed.
CHANCE_MARGIN = 1.1
_EVALUATION_BATCH = 500
# Settings of the networks that others are tuned from.
PRETRAINING: Settings = {"learning_rate": 0.2, "weight_decay": 0.04}
# Settings that are not arguments of `wrap()`.
_OF_TRAINING = (
    *("learning_rate", "weight_decay", "ema_momentum", "label_smoothing"),
    *("epochs", "dropout", "eps_grows", "last_layer_penalty"),
    *("averaged_from", "averaged_rate", "perturbed_from", "share_grows"),
    *("in_both_passes", "reference_momentum"),
)

Measured = dict[str, Any]


class BestEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the weights of the epoch with the best validation accuracy.

    Args:
        network: The network whose weights it keeps.
    """

    def __init__(self, network: keras.Model) -> None:
        super().__init__()
        self._network, self._accuracy = network, -1.0
        self.weights: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs["val_accuracy"] > self._accuracy:
            self._accuracy = logs["val_accuracy"]
            self.weights = self._network.get_weights()


class EpochAverage(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives a network the mean of its weights over the last epochs, at the end.

    BatchNorm's moments are measured anew.

    Args:
        network: The network.
        first: Index of the first epoch that counts.
        x: Training inputs.
        batch_size: Samples in a batch of them.

    Reference: Izmailov et al. (2018), https://arxiv.org/abs/1803.05407
    """

    def __init__(
        self, network: keras.Model, first: int, x: Any, batch_size: int
    ) -> None:
        super().__init__()
        self._network, self._first = network, first
        self._x, self._batch_size = x, batch_size
        self._weights: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch >= self._first:
            self._weights.append(self._network.get_weights())

    def on_train_end(self, logs: Any = None) -> None:
        means = [
            np.mean(weights, axis=0) for weights in zip(*self._weights, strict=True)
        ]
        self._network.set_weights(means)
        keras_nrs.update_batch_norm(self._network, self._x, batch_size=self._batch_size)


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures the time from the end of the first epoch, which compiles.

    It is the process's time of the CPU: other processes may use the machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first = self._last = 0.0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._last = time.process_time()
        if epoch == 0:
            self._first = self._last

    @property
    def seconds(self) -> float:
        return self._last - self._first


def perform(run: Run) -> Measured:
    """Train as a run asks for, and measure it.

    Returns:
        Of the stage `"choice"` what validation samples tell, of `"test"` what test
        samples do. A training that failed has the accuracy and the loss of chance.
    """
    keras.utils.clear_session()
    task = TASKS[run.task]
    with warnings.catch_warnings():
        # The study includes an eps that is too small.
        warnings.filterwarnings("ignore", message=".* has no effect with perturbation")
        network, best, measured = train(task, run.settings, run.seed)
    training, validation = task.training_data(run.seed)
    forward = Forward(network)
    at_end = quality(forward, training)
    measured |= {f"train_{name}": at_end[name] for name in ("accuracy", "loss")}
    if run.stage == "choice":
        found = quality(forward, validation)
        return _finite(measured | {f"validation_{k}": v for k, v in found.items()})
    test = task.test_data()
    found = quality(forward, test)
    if "failed" not in found:
        found = measure(network, train=training, validation=validation, test=test)
    if best:
        network.set_weights(best)
        found["best_epoch_accuracy"] = quality(forward, test)["accuracy"]
    return _finite(measured | found)


def train(
    task: Task, settings: Settings, seed: int
) -> tuple[keras.Model, list[Any], Measured]:
    """Train the network of a task.

    All arms have the same samples, initial weights and batches with a seed.

    Args:
        task: The task.
        settings: `learning_rate` and `weight_decay`; `epochs`, by which those of the
            task are multiplied; `ema_momentum`; `label_smoothing`; `dropout`, its rate;
            `last_layer_penalty`, its rate; `averaged_from`, the share of the training
            after which weights are averaged, and `averaged_rate`, the share of the
            learning rate that is left then; `eps_grows`, the factor by which eps grows;
            `perturbed_from`, the share of the training that is plain; `share_grows`,
            whether a third is plain, and a third perturbs every second step;
            `in_both_passes` or `reference_momentum` of `with_cheap_step()`; and
            arguments of `keras_nrs.wrap()`, which is called if there is a `scheme`.
        seed: Seed of all random numbers.

    Returns:
        The network; the weights of its best epoch, if the task has wrong labels; and
        the time of a step on a CPU, and the last values of the logs.
    """
    samples, validation = task.training_data(seed)
    network = initial_network(task, seed, dropout=settings.get("dropout", 0.0))
    num_classes = len(task.classes)
    steps_per_epoch = task.train // task.batch_size
    epochs = round(task.epochs * settings.get("epochs", 1))
    trained = with_cheap_step(network, task.name, settings)
    if "last_layer_penalty" in settings:
        # Losses are measured without it.
        trained = with_last_layer_penalty(network, settings["last_layer_penalty"])
    trained.compile(
        optimizer_of(task, settings, epochs * steps_per_epoch),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=settings.get("label_smoothing", 0.0)
        ),
        metrics=["accuracy"] if task.noise else None,
    )
    clock, best = Clock(), BestEpoch(network)
    callbacks = [clock, best] if task.noise else [clock]
    if "averaged_from" in settings:
        first = int(settings["averaged_from"] * epochs)
        callbacks.append(EpochAverage(network, first, samples.x, task.batch_size))
    validating: dict[str, Any] = {}
    if task.noise:
        one_hot = np.eye(num_classes, dtype="float32")[validation.y]
        validating["validation_data"] = validation.x, one_hot
        validating["validation_batch_size"] = _EVALUATION_BATCH
    data = batches(
        samples,
        size=task.batch_size,
        seed=seed,
        num_classes=num_classes,
        is_augmented=task.is_augmented,
    )
    fit_options: dict[str, Any] = validating | {
        "steps_per_epoch": steps_per_epoch,
        "shuffle": False,
        "verbose": 0,
        "callbacks": callbacks,
    }
    history: dict[str, list[float]] = {}
    start = 0
    for end, options in phases(settings, epochs):
        model = trained
        if options is not None:
            model = wrapped(trained, settings | options, epochs * steps_per_epoch)
        history = model.fit(
            data, initial_epoch=start, epochs=end, **fit_options
        ).history
        start = end
    steps = (epochs - 1) * steps_per_epoch
    measured = {f"last_{name}": values[-1] for name, values in history.items()}
    measured["cpu_seconds_per_step"] = clock.seconds / max(steps, 1)
    return network, best.weights, measured


def phases(settings: Settings, epochs: int) -> list[tuple[int, Settings | None]]:
    """For each phase of a training its end, and more settings; a plain one has none."""
    ends: dict[int, Settings | None] = {}
    if settings.get("share_grows"):
        ends = {round(epochs / 3): None, round(2 * epochs / 3): {"interval": 2}}
    elif "perturbed_from" in settings:
        ends = {round(settings["perturbed_from"] * epochs): None}
    return [*((end, of) for end, of in ends.items() if end), (epochs, {})]


def initial_network(task: Task, seed: int, *, dropout: float = 0.0) -> keras.Model:
    """The network of a task before it is trained."""
    network = task.network_of(seed, dropout=dropout)
    if task.starts_from:
        trained = pretrained(TASKS[task.starts_from], seed)
        *features, _ = (layer for layer in network.layers if layer.weights)
        *trained_features, _ = (layer for layer in trained.layers if layer.weights)
        for new, old in zip(features, trained_features, strict=True):
            new.set_weights(old.get_weights())
        # The same state of random numbers, whether a network was trained or loaded.
        keras.utils.set_random_seed(seed)
    return network


def pretrained(task: Task, seed: int) -> keras.Model:
    """The network of a task, trained plainly; a file keeps its weights."""
    name = f"{task.name}-{keras.config.backend()}-{PROTOCOL}-{seed}.weights.h5"
    path = CACHE / "pretrained" / name
    if path.exists():
        network = task.network_of(seed)
        network.load_weights(path)
        return network
    network, _, _ = train(task, PRETRAINING, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        network.save_weights(unfinished, overwrite=True)
    return network


def optimizer_of(task: Task, settings: Settings, steps: int) -> keras.Optimizer:
    """The task's optimizer, whose learning rate goes to zero along a cosine.

    Where weights are averaged, it goes to a share of its start, and stays there.
    """
    arguments: dict[str, Any] = {
        "learning_rate": keras.optimizers.schedules.CosineDecay(
            settings["learning_rate"],
            round(steps * settings.get("averaged_from", 1)),
            alpha=settings.get("averaged_rate", 0.0),
        ),
        "weight_decay": settings["weight_decay"],
        "global_clipnorm": CLIPNORM,
    }
    if "ema_momentum" in settings:
        arguments |= {"use_ema": True, "ema_momentum": settings["ema_momentum"]}
    if task.optimizer == "adamw":
        return keras.optimizers.AdamW(**arguments)
    return keras.optimizers.SGD(momentum=MOMENTUM, **arguments)


def wrapped(network: keras.Model, settings: Settings, steps: int) -> keras.Model:
    """The network as `keras_nrs.wrap()` trains it, or itself without a scheme."""
    if "scheme" not in settings:
        return network
    options = {k: v for k, v in settings.items() if k not in _OF_TRAINING}
    growth = settings.get("eps_grows")
    if growth:
        # It ends at `alpha` times its start.
        options["eps"] = keras.optimizers.schedules.CosineDecay(
            options["eps"] / growth, steps, alpha=growth
        )
    return keras_nrs.wrap(network, **options)


def quality(forward: Forward, samples: Samples) -> Measured:
    """Accuracy and mean cross-entropy in nats; those of chance, if it has failed."""
    logits = forward.logits(samples.x)
    found = accuracy(logits, samples.y), loss(logits, samples.y)
    chance = 1 / logits.shape[-1]
    if math.isfinite(found[1]) and found[0] > CHANCE_MARGIN * chance:
        return {"accuracy": found[0], "loss": found[1]}
    return {"accuracy": chance, "loss": -math.log(chance), "failed": True}


def _finite(measured: Measured) -> Measured:
    """The values with 6 digits, without those that JSON cannot hold."""
    return {
        name: value if isinstance(value, bool) else float(f"{value:.6g}")
        for name, value in measured.items()
        if math.isfinite(value)
    }
