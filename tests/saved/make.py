"""Made the files of this folder, with version 0.1.0 of keras_nrs on each backend.

    KERAS_BACKEND=jax python make.py

A file is a wrapped model after one epoch of training. Beside it are its variables after
one more epoch, trained without saving in between.
"""

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_nrs

FOLDER = Path(__file__).parent


def data() -> tuple[np.ndarray, np.ndarray]:
    """24 samples of 3 classes."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 4)).astype("float32"), np.arange(24) % 3


def train(model: Any, *, epochs: int, initial_epoch: int = 0) -> None:
    """Train in a fixed order."""
    model.fit(
        *data(),
        batch_size=8,
        epochs=epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
    )


def values(model: Any) -> list[np.ndarray]:
    """The variables of a model and of its optimizer."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def main() -> None:
    assert keras_nrs.__version__ == "0.1.0"
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3, seed=1),
            keras.layers.Dense(3),
        ]
    )
    base.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model = keras_nrs.wrap(
        base,
        eps=0.3,
        alpha=2.0,
        beta=0.5,
        perturbation=keras_nrs.perturbations.RelativeBall(radius="sphere"),
        divergence=keras_nrs.divergences.CategoricalKL(from_logits=True),
        interval=2,
        normalize=True,
        perturbations_per_replica=2,
        seed=3,
    )
    train(model, epochs=1)
    name = f"0.1.0-{keras.config.backend()}"
    model.save(FOLDER / f"{name}.keras")
    train(model, epochs=2, initial_epoch=1)
    np.savez_compressed(FOLDER / f"{name}.npz", *values(model))


if __name__ == "__main__":
    sys.exit(main())
