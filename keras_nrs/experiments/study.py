"""When does NRS help? A study on data that need no download.

    KERAS_BACKEND=jax python -m keras_nrs.experiments.study docs/study

For each task of `study_tasks.TASKS`:

1. Choice, by accuracy on validation samples (ties: by loss), mean over `CHOICE_SEEDS`:
   learning rate and weight decay of the baseline; then, with these, eps and alpha of
   each arm. No test sample is loaded.
2. Test, with other seeds, `TEST_SEEDS`: each arm is trained with what was chosen for
   it. The arms share samples, initial weights and batches for each seed, so that they
   can be compared in pairs.

Tasks that are held out also test two rules, whose settings were best on average over
the validation samples of the others: a fixed relative eps, and an eps that follows a
target for the divergence.

Each task has a file in the folder `runs`, to which a run is added when it is finished.
The same command goes on where it was stopped, and writes the report of all runs.
"""

import csv
import sys
import time
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.special import log_softmax

import keras_nrs
from keras_nrs import flatness
from keras_nrs._files import atomic_write
from keras_nrs.experiments import demo
from keras_nrs.experiments.report import write_report
from keras_nrs.experiments.results import read_runs
from keras_nrs.experiments.study_tasks import TASKS
from keras_nrs.experiments.study_tasks import Array
from keras_nrs.experiments.study_tasks import Samples
from keras_nrs.experiments.study_tasks import Task

CHOICE_SEEDS = range(1000, 1003)
TEST_SEEDS = range(10)
# All tasks train for the same number of steps, of 25 samples.
EPOCHS = 20
STEPS_PER_EPOCH = 20
# Of the training samples: what flatness is measured on.
FLATNESS_SAMPLES = 200
FLATNESS_BATCH = 50
# The same perturbation for all arms.
FLATNESS_EPS = 0.3
CALIBRATION_BINS = 15

Row = dict[str, Any]
Settings = dict[str, float]
Grid = list[Settings]


def grid(**values: Iterable[float]) -> Grid:
    """All combinations, as settings."""
    return [dict(zip(values, v, strict=True)) for v in product(*values.values())]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train.

    Attributes:
        scheme: Of `wrap()`; `None` leaves the model as it is.
        perturbation: Of `wrap()`.
        loss_weight: Of the compiled loss.
        grid: Settings to choose from; those not in it are the ones of `alpha_of` or
            `fixed`.
        alpha_of: Another arm, whose alpha is taken.
        fixed: Settings that are not chosen.
    """

    scheme: str | None = "nrs"
    perturbation: str = "relative"
    loss_weight: float = 1.0
    grid: Grid
    alpha_of: str | None = None
    fixed: Settings


def _arm(grid: Grid, **arguments: Any) -> Arm:
    return Arm(grid=grid, **{"fixed": {}} | arguments)


RELATIVE_EPS = (0.15, 0.3, 0.5)
NRS, ADAPTED = "NRS", "NRS, eps by target"
ARMS = {
    demo.BASELINE: _arm(
        grid(learning_rate=(1e-3, 3e-3, 1e-2), weight_decay=(0.01, 0.1, 1.0)),
        scheme=None,
    ),
    demo.TWICE_THE_LOSS: _arm([{}], scheme=None, loss_weight=2.0),
    demo.RPR: _arm(grid(eps=RELATIVE_EPS), scheme="rpr"),
    demo.NRS_ALPHA_0: _arm(grid(eps=RELATIVE_EPS), fixed={"alpha": 0.0}),
    NRS: _arm(grid(eps=RELATIVE_EPS, alpha=(0.5, 1.0, 4.0))),
    "NRS, the paper's ball": _arm(
        [{}], perturbation="ball", fixed={"eps": 0.1, "alpha": 1.0}
    ),
    "NRS, ball": _arm(grid(eps=(1.0, 3.0, 6.0)), perturbation="ball", alpha_of=NRS),
    "NRS, layerwise": _arm(
        grid(eps=(0.05, 0.1, 0.2)), perturbation="layerwise", alpha_of=NRS
    ),
    "NRS, released": _arm(
        grid(eps=(0.1, 0.25, 0.5)), perturbation="released", alpha_of=NRS
    ),
    ADAPTED: _arm(grid(target=(0.01, 0.03, 0.1, 0.3), alpha=(1.0, 4.0))),
}
# Of these arms: settings that were best for other tasks.
RULES = {"rule: fixed eps": NRS, "rule: eps by target": ADAPTED}


class DivergenceTarget(keras.callbacks.Callback):  # type: ignore[misc]
    """Takes eps after each epoch to where the model divergence was `target`.

    The divergence grows like the square of a small eps.

    Args:
        target: Mean model divergence over an epoch, in nats.
        max_eps: Of a relative perturbation: above 0.5, training can diverge.
        max_change: Factor between the eps of two epochs.
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


class RunFile:
    """Rows of finished runs in a CSV file, by what was run."""

    KEY = ("stage", "arm", "learning_rate", "weight_decay", "eps", "alpha", "target")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = read_rows(path) if path.exists() else []
        self._by_key = {self._key(row): row for row in self.rows}

    def get(self, wanted: Row, run: Callable[[], Row]) -> Row:
        """The row that has the values of `wanted`; its run, if there is none."""
        key = self._key(wanted)
        if key not in self._by_key:
            row = wanted | {name: _rounded(value) for name, value in run().items()}
            self.rows.append(row)
            self._by_key[key] = row
            self._write()
        return self._by_key[key]

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name, "") for name in (*self.KEY, "seed"))

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        with atomic_write(self.path) as unfinished, unfinished.open("w") as file:
            writer = csv.DictWriter(file, list(names), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of runs, numbers as such; empty values are left out."""
    with path.open(newline="") as file:
        return [
            {name: _number(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def _number(text: str) -> Any:
    for form in (int, float):
        try:
            return form(text)
        except ValueError:
            continue
    return text


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


class TaskRuns:
    """The runs of one task, and the models that they share.

    Args:
        task: What is trained.
        folder: Of the file of runs.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.file = RunFile(folder / f"{task.name}.csv")
        self._models: dict[Any, keras.Model] = {}
        self._network = task.build()
        self._network.compile(loss=_loss())
        self._chosen: dict[str, Settings] = {}

    def choose(self, name: str) -> Settings:
        """The settings that are best for an arm, on validation samples."""
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
        """Train an arm with settings, and measure it on test samples."""
        wanted = self._row("test", name, settings, seed)
        return self.file.get(wanted, partial(self._test, arm, settings, seed))

    def _score(self, name: str, settings: Settings) -> tuple[float, float]:
        rows = []
        for seed in CHOICE_SEEDS:
            wanted = self._row("choice", name, settings, seed)
            run = partial(self._validate, name, settings, seed)
            rows.append(self.file.get(wanted, run))
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
        return {f"validation_{name}": measured[name] for name in ("accuracy", "loss")}

    def _test(self, name: str, settings: Settings, seed: int) -> Row:
        train, _ = self.task.training_data(seed)
        trained = self._train(ARMS[name], settings, train, seed)
        measured = self._evaluate(self.task.test_data())
        row = {f"test_{name}": value for name, value in measured.items()} | trained
        if np.isfinite(measured["loss"]):
            row |= self._flatness(train)
        return row

    def _train(self, arm: Arm, settings: Settings, train: Samples, seed: int) -> Row:
        """Train, and leave the weights in the network that is measured."""
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
        """A model that needs no new compilation for another eps, alpha or seed."""
        rate, decay = settings["learning_rate"], settings["weight_decay"]
        key = arm.scheme, arm.perturbation, arm.loss_weight, rate, decay
        if key not in self._models:
            model = self.task.build()
            schedule = keras.optimizers.schedules.CosineDecay(
                rate, EPOCHS * STEPS_PER_EPOCH
            )
            model.compile(
                keras.optimizers.AdamW(schedule, weight_decay=decay),
                _loss(),
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
            # Training diverged: no better than a constant.
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


def _loss() -> keras.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def run_task(task: Task, folder: Path, rules: dict[str, Settings]) -> str:
    """Do the runs of a task that are not in its file yet.

    Args:
        task: One of `TASKS`.
        folder: Of the files.
        rules: Settings by name of the rule; of tasks that are held out.

    Returns:
        The name of the task.
    """
    # An eps that is too small is among what is studied.
    warnings.filterwarnings("ignore", message=".* has no effect with perturbation")
    runs = TaskRuns(task, folder)
    for name in ARMS:
        settings = runs.choose(name)
        for seed in TEST_SEEDS:
            runs.test(name, name, settings, seed)
    shared = runs.choose(demo.BASELINE)
    for rule, settings in rules.items():
        for seed in TEST_SEEDS:
            runs.test(rule, RULES[rule], shared | settings, seed)
    return task.name


def best_on_average(folder: Path, arm: str) -> Settings:
    """Settings of an arm with the highest mean gain in validation accuracy.

    The mean is over the tasks that are not held out, the gain is over the best
    baseline of the task.
    """
    gains = []
    for settings in ARMS[arm].grid:
        accuracies = [
            [
                row["validation_accuracy"]
                for row in read_rows(folder / f"{task.name}.csv")
                if row["stage"] == "choice" and row["arm"] == arm
                if all(row.get(name) == value for name, value in settings.items())
            ]
            for task in TASKS
            if not task.is_held_out
        ]
        gains.append(np.mean([np.mean(values) for values in accuracies]))
    # Baselines are the same for all settings, so that the mean accuracy will do.
    return ARMS[arm].grid[int(np.argmax(gains))]


def main(folder: Path, processes: int = 2) -> None:
    """Do the runs that are missing, in several processes, and write the report."""
    start = time.perf_counter()
    runs = folder / "runs"
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        rules: dict[str, Settings] = {}
        for held_out in (False, True):
            tasks = [task for task in TASKS if task.is_held_out == held_out]
            # The longest first.
            tasks.sort(key=lambda task: task.network != "vit")
            run = partial(run_task, folder=runs, rules=rules)
            for name in pool.map(run, tasks):
                minutes = (time.perf_counter() - start) / 60
                print(f"{name}: finished after {minutes:.1f} minutes", flush=True)
            if not held_out:
                rules = {r: best_on_average(runs, arm) for r, arm in RULES.items()}
                print(f"Rules: {rules}", flush=True)
    write_report(read_runs([runs]), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
