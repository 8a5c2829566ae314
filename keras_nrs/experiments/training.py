"""One training of a recipe in a folder, which goes on where it was stopped."""

import csv
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

import keras_nrs
from keras_nrs._checks import check_int
from keras_nrs._files import atomic_write
from keras_nrs._files import write_text
from keras_nrs.backend import data_parallel_scope
from keras_nrs.data import ImageData
from keras_nrs.experiments.recipes import NETWORKS
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.models import with_l2

_PACKAGES = ("keras-nrs", "keras", "jax", "tensorflow", "torch", "tensorflow-datasets")
_MANY_CLASSES = 100

Row = dict[str, Any]


def build(recipe: Recipe, data: ImageData, seed: int) -> keras_nrs.NRSModel:
    """The compiled and wrapped network of a recipe.

    Args:
        recipe: Names the network and how it is trained.
        data: Of the recipe: tells the shape of the images and the number of steps.
        seed: Of initial weights, dropout and perturbations.
    """
    keras.utils.set_random_seed(seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.dtype_policy)
    try:
        network = NETWORKS[recipe.network](data.image_shape, data.num_classes)
        if recipe.optimizer == "sgd" and recipe.weight_decay:
            network = with_l2(network, recipe.weight_decay)
    finally:
        keras.config.set_dtype_policy(policy)
    metrics: list[keras.metrics.Metric] = [
        keras.metrics.CategoricalAccuracy("accuracy"),
        # The loss without penalties on weights.
        keras.metrics.CategoricalCrossentropy("cross_entropy", from_logits=True),
    ]
    if data.num_classes > _MANY_CLASSES:
        metrics.append(keras.metrics.TopKCategoricalAccuracy(5, "top_5_accuracy"))
    network.compile(
        optimizer=_optimizer(recipe, network, _steps_per_epoch(recipe, data)),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=metrics,
    )
    return keras_nrs.wrap(
        network,
        recipe.eps,
        recipe.alpha,
        scheme=recipe.scheme,
        perturbation=recipe.perturbation,
        interval=recipe.interval,
        normalize=recipe.normalize,
        seed=seed,
    )


def _steps_per_epoch(recipe: Recipe, data: ImageData) -> int:
    return recipe.steps_per_epoch or data.steps_per_epoch


def _optimizer(recipe: Recipe, network: keras.Model, steps: int) -> keras.Optimizer:
    warmup = recipe.warmup_epochs * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else recipe.learning_rate,
        max(1, recipe.epochs * steps - warmup),
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    if recipe.optimizer == "sgd":
        # Its weight decay is a penalty of the network.
        return keras.optimizers.SGD(
            schedule, momentum=0.9, nesterov=True, global_clipnorm=recipe.clip_norm
        )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=recipe.weight_decay, global_clipnorm=recipe.clip_norm
    )
    # Like the penalty: neither biases, nor scales of normalization, nor embeddings.
    optimizer.exclude_from_weight_decay(
        [v for v in network.trainable_variables if v.name != "kernel"]
    )
    return optimizer


def differences(there: Row, here: Row) -> str:
    """What two descriptions do not have in common, where the first is from a file."""
    here = json.loads(_json(here))
    return "; ".join(
        f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


class RecipeError(ValueError):
    """The network of a recipe cannot be built for its data."""


class Training:
    """A training of a recipe with one seed.

    The folder gets `recipe.json`, `environment.json` (of each session), `history.csv`
    (a row for each epoch), `tensorboard/`, `checkpoint-EPOCHS.keras` (after each),
    and at the end `model.keras` (the network without the wrapper) and `summary.json`.
    Each file is written as a whole or not at all.

    Args:
        recipe: What to train.
        seed: One of the recipe's.
        folder: Where files go. A training that was stopped there goes on.
        data_dir: Folder of the prepared data sets; `None` is that of TFDS.
        test: Whether the summary is of the test images. Without them it is of the
            validation images, flatness is not measured, and no test image is read.

    Raises:
        TypeError, ValueError: if the folder is of another training, the data are not
            as the recipe needs them, or without `test` no images are held out.
        RecipeError: by `run()`, if the network is not for the data's images.
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
        self.steps_per_epoch = _steps_per_epoch(recipe, self.data)
        check_int("steps_per_epoch", self.steps_per_epoch, 1, self.data.steps_per_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether there is a summary."""
        return (self.folder / "summary.json").exists()

    def run(self, verbose: int = 2, until: int | None = None) -> Row:
        """Train what is left to train.

        Args:
            verbose: As in `fit()`.
            until: Epochs after which to stop, for a later call to go on; `None` is all.

        Returns:
            The summary: test metrics, the cost, and what was trained. Of a training
            that stops before its last epoch: validation metrics and the time so far.
        """
        epochs = self.recipe.epochs
        until = epochs if until is None else check_int("until", until, 1, epochs)
        epoch = epochs if self.is_finished else _last_epoch(self.folder)
        history = _read_history(self.folder / "history.csv")[:epoch]
        if until < epochs and until <= epoch:
            return self._summary_so_far(history[:until])
        if self.is_finished:
            summary: Row = json.loads((self.folder / "summary.json").read_text())
            return summary
        with data_parallel_scope():
            try:
                model = build(self.recipe, self.data, self.seed)
            except (TypeError, ValueError) as error:
                raise RecipeError(str(error)) from error
            write_text(self.folder / "recipe.json", _json(self._description))
            self._add_environment()
            if epoch:
                # Not a loaded model: which variables decay is not part of the file.
                # The optimizer's state is, and that of random generators.
                model.optimizer.build(model.trainable_variables)
                model.load_weights(_checkpoint(self.folder, epoch))
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
            shuffle=False,  # The data are.
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
        # On one device: averaged over several, metrics of batches that do not divide
        # are not exact in Keras.
        network = keras.saving.load_model(self.folder / "model.keras")
        split, images = (
            ("test", self.data.test())
            if self.test
            else ("validation", self.data.validation())
        )
        metrics = network.evaluate(images, verbose=0, return_dict=True)
        seconds = [row["seconds"] for row in history]
        summary = {
            "seed": self.seed,
            "epochs": len(history),
            **{f"{split}_{name}": value for name, value in metrics.items()},
            "training_seconds": sum(seconds),
            # Of most epochs: the first one compiles.
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
        # Not the seeds of other folders.
        found = json.loads(path.read_text(encoding="utf-8")) | {"seeds": None}
        different = differences(found, self._description | {"seeds": None})
        if different:
            raise ValueError(
                f"The folder {str(self.folder)!r} is of another training: "
                f"{different}. Choose another output folder."
            )

    def _add_environment(self) -> None:
        path = self.folder / "environment.json"
        sessions = json.loads(path.read_text()) if path.exists() else []
        write_text(path, _json([*sessions, _environment()]))


class _SaveEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes history and checkpoint after each epoch.

    An epoch's seconds are those before its validation. The history comes first: rows
    of epochs that the checkpoint does not have are dropped when training goes on.
    """

    def __init__(self, folder: Path, history: list[Row], seed: int) -> None:
        super().__init__()
        self._folder, self._history, self._seed = folder, history, seed

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # On PyTorch, Keras draws dropout masks from the global generator, whose state
        # is in no checkpoint. Not when the epoch begins: what fetches the first batch
        # draws from it as well.
        if batch == 0:
            epoch = len(self._history)
            keras.utils.set_random_seed((self._seed + 1_000_003 * epoch) % 2**31)

    def on_test_begin(self, logs: Any = None) -> None:
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = self._end - self._start
        logged = {name: float(value) for name, value in (logs or {}).items()}
        if not math.isfinite(logged["loss"]):
            # The checkpoint stays that of the epoch before.
            raise FloatingPointError(
                f"The loss is {logged['loss']} in epoch {epoch + 1} of "
                f"{str(self._folder)!r}. Use a lower learning_rate or clip_norm, and "
                "another output folder."
            )
        self._history.append({"epoch": epoch, "seconds": seconds, **logged})
        _write_history(self._folder / "history.csv", self._history)
        self.model.save(_checkpoint(self._folder, epoch + 1))
        _remove_checkpoints(self._folder, before=epoch + 1)


def _checkpoint(folder: Path, epoch: int) -> Path:
    """The file of the state after a number of epochs."""
    return folder / f"checkpoint-{epoch}.keras"


def _epochs_of_checkpoints(folder: Path) -> list[int]:
    paths = folder.glob("checkpoint-*.keras")
    return [int(path.stem.partition("-")[2]) for path in paths]


def _last_epoch(folder: Path) -> int:
    """The number of epochs after which there is a checkpoint."""
    return max(_epochs_of_checkpoints(folder), default=0)


def _remove_checkpoints(folder: Path, before: int) -> None:
    """Those of fewer epochs: more than one, if a stop left some."""
    for epoch in _epochs_of_checkpoints(folder):
        if epoch < before:
            _checkpoint(folder, epoch).unlink(missing_ok=True)


def _write_history(path: Path, history: list[Row]) -> None:
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def _read_history(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items()}
            | {"epoch": int(row["epoch"])}
            for row in csv.DictReader(file)
        ]


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
