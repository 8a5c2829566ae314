"""The runs of one task: training, measuring, and choosing settings."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.special import log_softmax

import keras_nrs
from keras_nrs import flatness
from keras_nrs.experiments import demo
from keras_nrs.experiments.run_store import RunStore
from studies.arms import ARMS
from studies.arms import RELATIVE_EPS
from studies.arms import Arm
from studies.arms import Settings
from studies.csv_rows import Row
from studies.csv_rows import read_rows
from studies.csv_rows import write_rows
from studies.study_tasks import Array
from studies.study_tasks import Samples
from studies.study_tasks import Task

CHOICE_SEEDS = range(1000, 1003)
TEST_SEEDS = range(10)
# All tasks train for the same number of steps, of 25 samples.
EPOCHS = 20
STEPS_PER_EPOCH = 20
# Flatness is measured on some of the training samples.
FLATNESS_SAMPLES = 200
FLATNESS_BATCH = 50
# The model divergence of all arms is measured with the same perturbation.
FLATNESS_EPS = 0.3
CALIBRATION_BINS = 15
_KEY = (
    *("stage", "arm", "learning_rate", "weight_decay", "eps", "alpha", "target"),
    "seed",
)


class DivergenceTarget(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets eps after each epoch so that the model divergence approaches `target`.

    The divergence grows like the square of a small eps.

    Args:
        target: Mean model divergence over an epoch, in nats.
        max_eps: Largest eps. With a relative eps above 0.5, training can diverge.
        max_change: Largest factor between the eps of two epochs.
    """

    def __init__(
        self, target: float, *, max_eps: float = 0.5, max_change: float = 2.0
    ) -> None:
        super().__init__()
        self.target, self.max_eps, self.max_change = target, max_eps, max_change

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        divergence = max(logs["model_divergence"], 1e-12)
        change = np.sqrt(self.target / divergence)
        change = np.clip(change, 1 / self.max_change, self.max_change)
        eps = float(keras.ops.convert_to_numpy(self.model.eps))
        self.model.eps = min(eps * change, self.max_eps)


def calibration_error(probabilities: Array, labels: Array) -> float:
    """Expected calibration error in [0, 1], with bins of equal width.

    Args:
        probabilities: Shape `(n, num_classes)`.
        labels: Integers of shape `(n,)`.

    Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599), Equation 5.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum(confidence * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    gaps = np.bincount(bins, confidence - correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


class CsvRunStore(RunStore):
    """Finished runs in a CSV file, as `keras-nrs report` reads it."""

    def _read(self) -> list[Row]:
        return read_rows(self.path)

    def _write(self) -> None:
        write_rows(self.path, self.rows)


class TaskRuns:
    """The runs of one task, and the models that they share.

    Args:
        task: The task.
        folder: Folder of the CSV file of runs.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.store = CsvRunStore(folder / f"{task.name}.csv", _KEY)
        self._models: dict[Any, keras.Model] = {}
        self._network = task.build()
        self._network.compile(loss=demo.crossentropy())
        self._chosen: dict[str, Settings] = {}

    def choose(self, name: str) -> Settings:
        """The settings of an arm that are best on validation samples."""
        if name not in self._chosen:
            arm = ARMS[name]
            shared = {} if name == demo.BASELINE else self.choose(demo.BASELINE)
            if arm.alpha_of:
                shared = shared | {"alpha": self.choose(arm.alpha_of)["alpha"]}
            candidates = [shared | arm.fixed | settings for settings in arm.grid]
            self._chosen[name] = (
                candidates[0]
                if len(candidates) == 1
                else max(candidates, key=partial(self._score, name))
            )
        return self._chosen[name]

    def test(self, name: str, arm: str, settings: Settings, seed: int) -> Row:
        """Train an arm, and measure it on test samples.

        Args:
            name: Name of the arm or the rule, for the file.
            arm: Name of the arm.
            settings: Its settings.
            seed: Seed of samples, initial weights, batches and perturbations.
        """
        wanted = self._row("test", name, settings, seed)
        return self.store.get(wanted, partial(self._test, arm, settings, seed))

    def _score(self, name: str, settings: Settings) -> tuple[float, float]:
        rows = []
        for seed in CHOICE_SEEDS:
            wanted = self._row("choice", name, settings, seed)
            run = partial(self._validate, name, settings, seed)
            rows.append(self.store.get(wanted, run))
        accuracy = np.mean([row["validation_accuracy"] for row in rows])
        loss = np.mean([row["validation_loss"] for row in rows])
        return float(accuracy), -float(loss)

    def _row(self, stage: str, name: str, settings: Settings, seed: int) -> Row:
        return {
            "dataset": f"{self.task.data}-{self.task.train_samples}",
            "network": self.task.network,
            "augmentation": "none",
            "stage": stage,
            "arm": name,
            **settings,
            "seed": seed,
        }

    def _validate(self, name: str, settings: Settings, seed: int) -> Row:
        train, validation = self.task.training_data(seed)
        self._train(ARMS[name], settings, train, seed)
        measured = self._evaluate(validation)
        names = ("accuracy", "loss")
        return _rounded({f"validation_{name}": measured[name] for name in names})

    def _test(self, name: str, settings: Settings, seed: int) -> Row:
        train, _ = self.task.training_data(seed)
        trained = self._train(ARMS[name], settings, train, seed)
        measured = self._evaluate(self.task.test_data())
        row = {f"test_{name}": value for name, value in measured.items()} | trained
        if np.isfinite(measured["loss"]):
            row |= self._flatness(train)
        return _rounded(row)

    def _train(self, arm: Arm, settings: Settings, train: Samples, seed: int) -> Row:
        """Train, and copy the weights to the network that is measured."""
        model = self._model(arm, settings)
        keras.utils.set_random_seed(seed)
        demo.reset(model, seed, self.task.build().get_weights())
        callbacks = []
        if arm.scheme:
            model.eps = settings.get("eps", RELATIVE_EPS[0])
            model.alpha = settings.get("alpha", 0.0)
            if "target" in settings:
                callbacks.append(DivergenceTarget(settings["target"]))
        start = time.perf_counter()
        history = model.fit(
            demo.batches(*train, seed=seed),
            steps_per_epoch=STEPS_PER_EPOCH,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        ).history
        seconds = (time.perf_counter() - start) / (EPOCHS * STEPS_PER_EPOCH)
        self._network.set_weights(demo.base_model(model).get_weights())
        row = {"seconds_per_step": seconds}
        if arm.scheme == "nrs":
            row["training_divergence"] = history["model_divergence"][-1]
            row["last_eps"] = float(keras.ops.convert_to_numpy(model.eps))
        return row

    def _model(self, arm: Arm, settings: Settings) -> keras.Model:
        """A model, compiled once for all eps, alphas and seeds."""
        rate, decay = settings["learning_rate"], settings["weight_decay"]
        key = arm.scheme, arm.perturbation, arm.loss_weight, rate, decay
        if key not in self._models:
            model = self.task.build()
            schedule = keras.optimizers.schedules.CosineDecay(
                rate, EPOCHS * STEPS_PER_EPOCH
            )
            model.compile(
                keras.optimizers.AdamW(schedule, weight_decay=decay),
                demo.crossentropy(),
                loss_weights=arm.loss_weight,
            )
            if arm.scheme:
                model = keras_nrs.wrap(
                    model, scheme=arm.scheme, perturbation=arm.perturbation
                )
            self._models[key] = model
        return self._models[key]

    def _evaluate(self, samples: Samples) -> Row:
        """Accuracy, mean cross-entropy in nats, and calibration error."""
        logits = np.asarray(self._network.predict(samples.x, verbose=0), "float64")
        if not np.isfinite(logits).all():
            # A diverged network is no better than chance.
            return {"accuracy": 1 / logits.shape[1], "loss": np.inf}
        log_probabilities = log_softmax(logits, axis=1)
        chosen = log_probabilities[np.arange(len(samples.y)), samples.y]
        return {
            "accuracy": float(np.mean(logits.argmax(axis=1) == samples.y)),
            "loss": float(-chosen.mean()),
            "calibration_error": calibration_error(
                np.exp(log_probabilities), samples.y
            ),
        }

    def _flatness(self, train: Samples) -> Row:
        x, y = (array[:FLATNESS_SAMPLES] for array in train)
        eigenvalue = partial(
            flatness.hessian_eigenvalues,
            self._network,
            x,
            y,
            batch_size=FLATNESS_BATCH,
        )
        divergence = flatness.model_divergence(
            self._network,
            x,
            eps=FLATNESS_EPS,
            perturbation="relative",
            batch_size=FLATNESS_BATCH,
        )
        return {
            "model_divergence": float(divergence.mean),
            "last_layer_eigenvalue": float(eigenvalue().eigenvalues[0]),
            "eigenvalue": float(eigenvalue(variables="all").eigenvalues[0]),
        }


def _rounded(row: Row) -> Row:
    """The row, with 6 digits of each float."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
