"""One training of a recipe, in a folder where it goes on after a stop."""

import dataclasses
import json
import math
import platform
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

import keras_nrs
from keras_nrs._checks import check_int
from keras_nrs._files import atomic_write
from keras_nrs._files import write_text
from keras_nrs.backend import data_parallel_scope
from keras_nrs.data import ImageData
from keras_nrs.experiments.recipe_model import build_model
from keras_nrs.experiments.recipes import VALUES_OF_OLD_FILES
from keras_nrs.experiments.recipes import Recipe

Row = dict[str, Any]

_PACKAGES = ("keras-nrs", "keras", "jax", "tensorflow", "torch", "tensorflow-datasets")


def differences(there: Row, here: Row) -> str:
    """Says how the description in a file differs from another one."""
    here = json.loads(_json(here))
    return "; ".join(
        f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


class RecipeError(ValueError):
    """A recipe's network cannot be built for the recipe's data."""


class Training:
    """A training of a recipe with one seed.

    The folder gets `recipe.json`, `environment.json` (an entry for each session),
    `history.csv` (a row for each epoch), `tensorboard/`, `checkpoint-EPOCHS.keras`
    (the latest), and at the end `model.keras` (the network without the wrapper) and
    `summary.json`. Each file is written atomically.

    Args:
        recipe: What to train.
        seed: One of the recipe's seeds.
        folder: Output folder. A training that was stopped there goes on.
        data_dir: Folder of the prepared data sets; `None` is TFDS's own.
        test: Whether to measure on test images at the end. If not, the summary is of
            validation images, has no flatness, and no test image is read.

    Raises:
        TypeError, ValueError: if another training wrote the folder, the data do not
            suit the recipe, or no images are held out though `test` is False.
        RecipeError: by `run()`, if the network cannot have the data's images.
        FloatingPointError: by `run()`, if the loss is not finite after an epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        folder: Path,
        data_dir: str | None = None,
        *,
        test: bool = True,
    ) -> None:
        self.recipe, self.seed, self.folder, self.test = recipe, seed, folder, test
        if not test:
            check_int("validation_percent", recipe.validation_percent, 1, 90)
        self._check_folder()
        self.data = ImageData(**recipe.data_settings(), seed=seed, data_dir=data_dir)
        self.steps_per_epoch = recipe.steps_per_epoch or self.data.steps_per_epoch
        check_int("steps_per_epoch", self.steps_per_epoch, 1, self.data.steps_per_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether the summary is written."""
        return (self.folder / "summary.json").exists()

    def run(self, verbose: int = 2, until: int | None = None) -> Row:
        """Train the epochs that are missing.

        Args:
            verbose: As in `fit()`.
            until: Number of epochs after which to stop; `None` is the recipe's. A
                later call can go on.

        Returns:
            After the last epoch, the summary: test metrics, costs, number of weights
            and images. Before it, validation metrics and the time so far.
        """
        epochs = self.recipe.epochs
        until = epochs if until is None else check_int("until", until, 1, epochs)
        checkpoints = _checkpoints(self.folder)
        epoch = epochs if self.is_finished else max(checkpoints, default=0)
        path, history = self.folder / "history.csv", []
        if path.exists():
            # It may have an epoch more, whose checkpoint was not written.
            # Pandas rounds floats that it reads, but not texts that it converts.
            rows = pd.read_csv(path, nrows=epoch, dtype=str).astype(float)
            history = rows.astype({"epoch": int}).to_dict("records")
        if until < epochs and until <= epoch:
            return self._summary_so_far(history[:until])
        if self.is_finished:
            return json.loads((self.folder / "summary.json").read_text())
        with data_parallel_scope():
            try:
                model = build_model(self.recipe, self.data, self.seed)
            except (TypeError, ValueError) as error:
                raise RecipeError(str(error)) from error
            write_text(self.folder / "recipe.json", _json(self._description))
            self._add_environment()
            if epoch:
                # Weights alone: a file does not say which variables decay. It has the
                # states of the optimizer and the random generators.
                model.optimizer.build(model.trainable_variables)
                model.load_weights(checkpoints[epoch])
            if epoch < until:
                self._fit(model, range(epoch, until), history, verbose)
            if until < epochs:
                return self._summary_so_far(history)
            with atomic_write(self.folder / "model.keras") as unfinished:
                keras_nrs.unwrap(model).save(unfinished)
        summary = self._summary(history)
        write_text(self.folder / "summary.json", _json(summary))
        _remove_checkpoints(self.folder, before=epochs + 1)
        return summary

    def _fit(
        self, model: keras.Model, epochs: range, history: list[Row], verbose: int
    ) -> None:
        validation = self.data.validation()
        model.fit(
            self.data.train(epochs.start, self.steps_per_epoch),
            initial_epoch=epochs.start,
            epochs=epochs.stop,
            steps_per_epoch=self.steps_per_epoch,
            shuffle=False,  # The data are shuffled.
            validation_data=self.data.test() if validation is None else validation,
            verbose=verbose,
            callbacks=[
                _SaveEpoch(self.folder, history, self.seed),
                keras.callbacks.TensorBoard(
                    str(self.folder / "tensorboard"), write_graph=False
                ),
            ],
        )

    def _summary_so_far(self, history: list[Row]) -> Row:
        metrics = {
            f"validation_{name.removeprefix('val_')}": value
            for name, value in history[-1].items()
            if name.startswith("val_")
        }
        seconds = sum(row["seconds"] for row in history)
        return {"epochs": len(history), **metrics, "training_seconds": seconds}

    def _summary(self, history: list[Row]) -> Row:
        # On one device: Keras averages metrics over devices, which is not exact where
        # they do not divide the batch.
        network = keras.saving.load_model(self.folder / "model.keras")
        split = "test" if self.test else "validation"
        images = self.data.test() if self.test else self.data.validation()
        metrics = network.evaluate(images, verbose=0, return_dict=True)
        seconds = [row["seconds"] for row in history]
        summary = {
            "seed": self.seed,
            "epochs": len(history),
            **{f"{split}_{name}": value for name, value in metrics.items()},
            "training_seconds": sum(seconds),
            # The median leaves out the first epoch, which compiles.
            "seconds_per_step": float(np.median(seconds)) / self.steps_per_epoch,
            "peak_memory_mib": _peak_memory() / 2**20,
            "parameters": network.count_params(),
            "training_images": self.data.num_train,
        }
        if self.recipe.flatness and self.test:
            summary |= self._flatness(network)
        return summary

    def _flatness(self, network: keras.Model) -> Row:
        from keras_nrs import flatness

        images = self.data.train_images()
        steps = math.ceil(self.data.num_train / self.recipe.batch_size)
        exact = flatness.hessian_eigenvalues(network, images)
        kfra = flatness.kfra_max_eigenvalue(network, images, steps=steps)
        return {
            "last_layer_eigenvalue": float(exact.eigenvalues[0]),
            "last_layer_eigenvalue_converged": exact.converged,
            "last_layer_kfra_eigenvalue": float(kfra.eigenvalue),
        }

    @property
    def _description(self) -> Row:
        description = dataclasses.asdict(self.recipe) | {"seed": self.seed}
        return description if self.test else description | {"test": False}

    def _check_folder(self) -> None:
        path = self.folder / "recipe.json"
        if not path.exists():
            return
        # The recipe's other seeds have folders of their own.
        found = json.loads(path.read_text(encoding="utf-8"))
        found = VALUES_OF_OLD_FILES | found | {"seeds": None}
        different = differences(found, self._description | {"seeds": None})
        if different:
            raise ValueError(
                f"The folder {str(self.folder)!r} belongs to another training: "
                f"{different}. Choose another output folder."
            )

    def _add_environment(self) -> None:
        path = self.folder / "environment.json"
        sessions = json.loads(path.read_text()) if path.exists() else []
        write_text(path, _json([*sessions, _environment()]))


class _SaveEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes history and checkpoint after each epoch.

    An epoch's seconds end before its validation. The history is written first: a
    training that goes on drops rows of epochs later than its checkpoint.
    """

    def __init__(self, folder: Path, history: list[Row], seed: int) -> None:
        super().__init__()
        self._folder, self._history, self._seed = folder, history, seed

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # On PyTorch, Keras draws dropout masks from the global generator, whose state
        # no checkpoint has. Fetching an epoch's first batch draws from it too, so the
        # seed is set afterwards.
        if batch == 0:
            epoch = len(self._history)
            keras.utils.set_random_seed((self._seed + 1_000_003 * epoch) % 2**31)

    def on_test_begin(self, logs: Any = None) -> None:
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = self._end - self._start
        logged = {name: float(value) for name, value in (logs or {}).items()}
        if not math.isfinite(logged["loss"]):
            # The checkpoint of the epoch before stays.
            raise FloatingPointError(
                f"The loss is {logged['loss']} in epoch {epoch + 1} of "
                f"{str(self._folder)!r}. Use a lower learning_rate or clip_norm, and "
                "another output folder."
            )
        self._history.append({"epoch": epoch, "seconds": seconds, **logged})
        rows = pd.DataFrame(self._history).to_csv(index=False, na_rep="nan")
        write_text(self._folder / "history.csv", rows)
        self.model.save(self._folder / f"checkpoint-{epoch + 1}.keras")
        _remove_checkpoints(self._folder, before=epoch + 1)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints by their number of epochs. A stop can leave more than one."""
    paths = folder.glob("checkpoint-*.keras")
    return {int(path.stem.partition("-")[2]): path for path in paths}


def _remove_checkpoints(folder: Path, before: int) -> None:
    for epoch, path in _checkpoints(folder).items():
        if epoch < before:
            path.unlink(missing_ok=True)


def _environment() -> Row:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": keras.config.backend(),
        "packages": versions,
    }


def _peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
