"""What `keras_nrs.tune` decides on three data sets, and in which time.

    KERAS_BACKEND=jax python -m studies.decisions --minutes 3 [digits] [TASK ...]

Two are tasks of the study, with the learning rate and the weight decay that its
baseline has chosen, and the samples of seed 0; docs/results.md has what the study says
of them. The third is 200 of scikit-learn's digits, which the study does not have.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras

import keras_nrs
from keras_nrs._digits import load_digits
from keras_nrs._digits import pool_and_test
from studies.data import NUM_CLASSES
from studies.data import Samples
from studies.networks import NETWORKS
from studies.tasks import TASKS
from studies.tasks import Settings
from studies.training import optimizer_of

DIGITS = "digits"
DIGITS_EPOCHS, DIGITS_TRAIN, HIDDEN = 60, 200, 64
# Choices of the study's baseline, of docs/results.md.
CHOSEN: dict[str, Settings] = {
    "mnist1d-cnn-1000": {"learning_rate": 0.3, "weight_decay": 0.003},
    "fashion-mlp-3000": {"learning_rate": 0.001, "weight_decay": 0.03},
}


class Case(NamedTuple):
    """A model and data for `tune()`."""

    make_model: Callable[[int], keras.Model]
    train: Samples
    validation: Samples
    fit: dict[str, Any]


def case_of(name: str, settings: Settings) -> Case:
    """A task of the study, with settings of its baseline."""
    task = TASKS[name]
    steps_per_epoch = -(-task.train // task.batch_size)

    def make_model(epochs: int) -> keras.Model:
        model = NETWORKS[task.network](task.input_shape, NUM_CLASSES)
        _compile(model, optimizer_of(task, settings, epochs * steps_per_epoch))
        return model

    fit = {"epochs": task.epochs, "batch_size": task.batch_size}
    return Case(make_model, *task.training_data(0), fit)


def digits() -> Case:
    """An MLP on a few digits; the others of the pool are for validation."""
    x, y = load_digits()
    pool, _ = pool_and_test(y)

    def make_model(epochs: int) -> keras.Model:
        hidden = keras.layers.Dense(HIDDEN, activation="relu")
        stack = [keras.layers.Flatten(), hidden, keras.layers.Dense(NUM_CLASSES)]
        model = keras.Sequential([keras.Input((8, 8, 1)), *stack])
        steps = epochs * -(-DIGITS_TRAIN // 32)
        rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        _compile(model, keras.optimizers.AdamW(rate, weight_decay=0.01))
        return model

    first, others = pool[:DIGITS_TRAIN], pool[DIGITS_TRAIN:]
    train, validation = (Samples(x[part], y[part]) for part in (first, others))
    fit = {"epochs": DIGITS_EPOCHS, "batch_size": 32}
    return Case(make_model, train, validation, fit)


def _compile(model: keras.Model, optimizer: keras.Optimizer) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])


def decide(case: Case, **options: Any) -> keras_nrs.TuneResult:
    """The result of `tune()` on a case."""
    return keras_nrs.tune(
        case.make_model,
        *case.train,
        validation_data=tuple(case.validation),
        fit=case.fit,
        **options,
    )


def main(arguments: list[str]) -> None:
    """Decide for each data set, and print how long it took."""
    parser = argparse.ArgumentParser(prog="python -m studies.decisions")
    parser.add_argument("names", nargs="*", default=[DIGITS, *CHOSEN])
    parser.add_argument("--minutes", type=float, default=3.0, help="of each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--metric", default="auto")
    parser.add_argument("--folder", type=Path, help="folder of finished trainings")
    parsed = parser.parse_args(arguments)
    for name in parsed.names:
        case = digits() if name == DIGITS else case_of(name, CHOSEN[name])
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        folder = None if parsed.folder is None else parsed.folder / name
        decide(
            case,
            minutes=parsed.minutes,
            seeds=parsed.seeds,
            metric=parsed.metric,
            folder=folder,
        )
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
