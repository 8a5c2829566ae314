"""One training of a recipe, in a folder where it goes on after a stop."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_nrs
from keras_nrs._checks import check_int
from keras_nrs._files import DamagedFileError
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text
from keras_nrs._locks import Lock
from keras_nrs._locks import locked
from keras_nrs.backend import data_parallel_scope
from keras_nrs.backend import fit_scope
from keras_nrs.backend import processes
from keras_nrs.backend import shares_of_workers
from keras_nrs.backend import values_of_processes
from keras_nrs.data import ImageData
from keras_nrs.experiments.checkpoints import Checkpoints
from keras_nrs.experiments.checkpoints import Row
from keras_nrs.experiments.recipe_model import build_model
from keras_nrs.experiments.recipes import VALUES_OF_OLD_FILES
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipe_of
from keras_nrs.experiments.sessions import add_session
from keras_nrs.experiments.sessions import peak_memory
from keras_nrs.saving import write_by_first_process

# Keeps the dropout masks of processes apart, where they have no seeds of their own.
_PROCESS_STRIDE = 7_919


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
    (the latest two), and at the end `model.keras` (the network without the wrapper) and
    `summary.json`. Each file is written atomically, and by one process at a time.

    Processes that called `backend.join_processes()` train together, each on its share
    of each batch, and all of them must make and run the same trainings. The first one
    writes; all of them read the folder.

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
        DamagedFileError: also by `run()`, if a file in the folder cannot be right.
        InUseError: by `run()`, if another process is training in the folder.
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
        self._index, self._number = processes()
        if not test:
            check_int("validation_percent", recipe.validation_percent, 1, 90)
        self._callbacks: list[keras.callbacks.Callback] = []
        self._summary_path = folder / "summary.json"
        self._checkpoints = Checkpoints(folder, recipe.epochs, self._check_description)
        self._check_folder()
        if self._index > 0:
            self._wait()  # The first process prepares the files.
        self.data = ImageData(
            **recipe.data_settings(),
            seed=seed,
            num_shards=self._number,
            shard_index=self._index,
            data_dir=data_dir,
        )
        if self._index == 0:
            self._wait()
        self.steps_per_epoch = recipe.steps_per_epoch or self.data.steps_per_epoch
        check_int("steps_per_epoch", self.steps_per_epoch, 1, self.data.steps_per_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether the summary is written, as the first process sees it."""
        return bool(values_of_processes([self._summary_path.exists()])[0][0])

    def run(
        self,
        verbose: int = 2,
        until: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> Row:
        """Train the epochs that are missing.

        Args:
            verbose: As in `fit()`.
            until: Number of epochs after which to stop; `None` is the recipe's. A
                later call can go on.
            callbacks: Others than those that write files.

        Returns:
            After the last epoch, the summary: test metrics, costs, number of weights
            and images. Before it, validation metrics and the time so far.
        """
        self._callbacks = list(callbacks)
        epochs = self.recipe.epochs
        until = epochs if until is None else check_int("until", until, 1, epochs)
        if not self.is_finished:
            with self._locked() as lock:
                self._check_folder()
                # Another process may have ended it before the lock was free.
                if not self.is_finished:
                    return self._run(verbose, until, lock)
        if until < epochs:
            return self._summary_so_far(self._checkpoints.read_history(until))
        return self._read_summary()

    def _read_summary(self) -> Row:
        remedy = "Delete its folder to train again."
        return read_json(self._summary_path, self._check_summary, remedy=remedy)

    def _check_summary(self, content: Any) -> None:
        expect_object(content, epochs=int, training_seconds=float)
        if content["epochs"] != self.recipe.epochs:
            raise ValueError(f"its 'epochs' are {content['epochs']}")

    def _run(self, verbose: int, until: int, lock: Lock | None) -> Row:
        checkpoint, history = self._checkpoints.newest()
        self._check_all_have(len(history))
        if until < self.recipe.epochs and until <= len(history):
            return self._summary_so_far(history[:until])
        local_copy = self._build() if self._number > 1 else None
        with data_parallel_scope():
            model = self._build()
            if checkpoint is not None:
                _load_weights(model, checkpoint)
        if lock is not None:
            write_text(self.folder / "recipe.json", _json(self._description))
            add_session(self.folder)
        with fit_scope():
            if len(history) < until:
                self._fit(model, until, history, local_copy, verbose=verbose, lock=lock)
        if until < self.recipe.epochs:
            return self._summary_so_far(history)
        save, path = keras_nrs.unwrap(model).save, self.folder / "model.keras"
        write_by_first_process(save, ".keras", path, True, self._index)
        if lock is not None:
            summary = self._summary(history)
            lock.check()
            write_text(self._summary_path, _json(summary))
            self._checkpoints.remove()
        self._wait()
        return self._read_summary()

    def _build(self) -> keras.Model:
        try:
            return build_model(self.recipe, self.data, self.seed)
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from error

    def _fit(
        self,
        model: keras.Model,
        until: int,
        history: list[Row],
        local_copy: keras.Model | None,
        *,
        verbose: int,
        lock: Lock | None,
    ) -> None:
        def save(history: list[Row]) -> None:
            if lock is None:  # It takes all processes, and writes nothing in this one.
                model.save("unused.keras")
                return
            lock.check()
            self._checkpoints.write(model, history, self._description)

        def validate() -> Row:
            return self._validate_together(model, local_copy)

        first = len(history)
        batches = self.data.train(first, self.steps_per_epoch)
        model.fit(
            shares_of_workers(batches, self.recipe.batch_size // self._number),
            initial_epoch=first,
            epochs=until,
            steps_per_epoch=self.steps_per_epoch,
            shuffle=False,  # The data are shuffled.
            validation_data=self._validation() if local_copy is None else None,
            verbose=verbose if self._index == 0 else 0,
            callbacks=[
                _SaveEpoch(
                    save,
                    history,
                    seed=self.seed + _PROCESS_STRIDE * self._index,
                    folder=self.folder,
                    validate=None if local_copy is None else validate,
                ),
                *self._own_callbacks(),
            ],
        )

    def _own_callbacks(self) -> list[keras.callbacks.Callback]:
        """Those that show a training, in the first process alone."""
        if self._index > 0:
            return []
        folder = str(self.folder / "tensorboard")
        return [
            keras.callbacks.TensorBoard(folder, write_graph=False),
            *self._callbacks,
        ]

    def _validation(self) -> Any:
        """The held out images, or the test images of a recipe that holds out none."""
        held_out = self.data.validation()
        return self.data.test() if held_out is None else held_out

    # With the other processes, if there are any.

    def _validate_together(self, model: keras.Model, local_copy: keras.Model) -> Row:
        """Logs of validation, to which each process adds its share of the batches.

        Each uses one device, for the copy: the last batch need not divide.
        """
        network = keras_nrs.unwrap(local_copy)
        network.set_weights(keras_nrs.unwrap(model).get_weights())
        share = self._validation().shard(self._number, self._index)
        distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            network.evaluate(share, verbose=0)
        finally:
            keras.distribution.set_distribution(distribution)
        variables = network.metrics_variables  # Sums and counts, all of them scalars.
        own = [float(keras.ops.convert_to_numpy(v)) for v in variables]
        sums = np.sum(values_of_processes(own), axis=0)
        for variable, total in zip(variables, sums, strict=True):
            variable.assign(total)
        metrics = network.get_metrics_result()
        return {f"val_{name}": float(value) for name, value in sorted(metrics.items())}

    @contextmanager
    def _locked(self) -> Iterator[Lock | None]:
        """A lock of the folder in the first process, `None` in the others."""
        if self._index > 0:
            yield None
            return
        with locked(self.folder) as lock:
            yield lock

    def _wait(self) -> None:
        """Wait until all processes are here."""
        values_of_processes([0])

    def _check_all_have(self, epochs: int) -> None:
        """Raise an error if processes go on from other epochs."""
        found = [int(number) for (number,) in values_of_processes([epochs])]
        if len(set(found)) > 1:
            raise ValueError(
                "All processes must read the same output folder. Received: "
                f"{str(self.folder)!r}, where they find {found} trained epochs, by "
                "process. Use a folder that all hosts share."
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
            **{f"{split}_{name}": value for name, value in sorted(metrics.items())},
            "training_seconds": sum(seconds),
            # The median leaves out the first epoch, which compiles.
            "seconds_per_step": float(np.median(seconds)) / self.steps_per_epoch,
            "parameters": network.count_params(),
            "training_images": self.data.num_train,
        }
        memory = peak_memory()
        if memory is not None:
            summary["peak_memory_mib"] = memory / 2**20
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
        remedy = "Restore it, or choose another output folder."
        if path.exists():
            self._check_description(read_json(path, recipe_of, remedy=remedy))
        elif self._summary_path.exists():
            raise DamagedFileError(path, "it is missing beside a summary.json", remedy)

    def _check_description(self, found: Row) -> None:
        """Raise an error if a file is of another training."""
        # The recipe's other seeds have folders of their own.
        found = VALUES_OF_OLD_FILES | found | {"seeds": None}
        different = differences(found, self._description | {"seeds": None})
        if different:
            raise ValueError(
                f"The folder {str(self.folder)!r} belongs to another training: "
                f"{different}. Choose another output folder."
            )


def _load_weights(model: keras.Model, path: Path) -> None:
    """Load a checkpoint, whose checksums are right.

    Weights alone: a file does not say which variables decay. It has the states of the
    optimizer and the random generators.
    """
    model.optimizer.build(model.trainable_variables)
    try:
        model.load_weights(path)
    except (ValueError, KeyError) as error:
        remedy = "Delete it: the training goes on from an older one, or begins."
        raise DamagedFileError(path, error, remedy) from error


class _SaveEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Adds a row to the history after each epoch, and saves it with the model.

    An epoch's seconds end before its validation, which is `fit()`'s or `validate()`.
    """

    def __init__(
        self,
        save: Callable[[list[Row]], None],
        history: list[Row],
        *,
        seed: int,
        folder: Path,
        validate: Callable[[], Row] | None = None,
    ) -> None:
        super().__init__()
        self._save, self._history = save, history
        self._seed, self._folder, self._validate = seed, folder, validate

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
        if self._validate is not None and logs is not None:
            self._end = time.perf_counter()
            logs.update(self._validate())
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
        self._save(self._history)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
