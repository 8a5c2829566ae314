"""NRS and its controls on the handwritten digits that scikit-learn ships.

Few training images, a small network, and five arms that share split, initial weights
and batches for each seed, so that they can be compared in pairs. The experiment runs
in minutes on a laptop; `keras-nrs demo` is its command.
"""

import json
import os
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from itertools import count
from itertools import groupby
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

import keras_nrs
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_positive
from keras_nrs._files import write_text

try:
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh
    from scipy.special import log_softmax
    from scipy.special import softmax
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demo needs the package {error.name}. Install it with: "
        'pip install "keras-nrs[demo]"',
        name=error.name,
    ) from error

Array = NDArray[Any]

BASELINE = "baseline"
TWICE_THE_LOSS = "baseline, twice the loss"
RPR = "RPR"
NRS_ALPHA_0 = "NRS, alpha 0"
NRS = "NRS"
ARMS = (BASELINE, TWICE_THE_LOSS, RPR, NRS_ALPHA_0, NRS)

NUM_CLASSES = 10
TEST_IMAGES = 797
MAX_TRAIN_IMAGES = 900
BATCH_SIZE = 25
# One split for all seeds: what chose the settings must not have seen the test images.
TEST_SPLIT_SEED = 0
NUM_DELTAS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms and seeds of one experiment share.

    Args:
        train_images: Number of training images, from 10 to 900. The other images of
            the pool of 1,000 are the validation split.
        epochs: Passes over the training images, >= 1.
        learning_rate: Of AdamW at the first step; a cosine takes it to zero.
        weight_decay: Of AdamW, multiplied by the learning rate, >= 0.
        eps: Size of delta relative to the norm of the weights, >= 0.
        alpha: Weight of the model divergence, >= 0.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    train_images: int = 100
    epochs: int = 100
    # Chosen by `KERAS_BACKEND=jax python -m keras_nrs.experiments.tune_demo`: best of
    # 20 for the baseline (validation accuracy 92.65 %), then best of 20 for NRS
    # (93.43 %). All 16 settings with eps >= 0.2 were between 92.89 and 93.43 %.
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    eps: float = 0.5
    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_int("train_images", self.train_images, minimum=NUM_CLASSES)
        if self.train_images > MAX_TRAIN_IMAGES:
            raise ValueError(
                f"`train_images` must be <= {MAX_TRAIN_IMAGES}, which leaves images to "
                f"validate with. Received: train_images={self.train_images}."
            )
        check_int("epochs", self.epochs, minimum=1)
        check_positive("learning_rate", self.learning_rate)
        check_nonnegative("weight_decay", self.weight_decay)
        check_nonnegative("eps", self.eps)
        check_nonnegative("alpha", self.alpha)


class Split(NamedTuple):
    """Images of shape `(n, 8, 8, 1)` in [0, 1] and labels of shape `(n,)`."""

    x_train: Array
    y_train: Array
    x_validation: Array
    y_validation: Array
    x_test: Array
    y_test: Array


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured after one training.

    Attributes:
        arm: One of `ARMS`.
        seed: Of the split, the initial weights, the batches and the perturbations.
        test_accuracy: Share of the test images, in [0, 1].
        test_loss: Mean cross-entropy over the test images, in nats.
        model_divergence: See `mean_model_divergence`, in nats.
        eigenvalue: See `last_layer_eigenvalue`, in nats.
    """

    arm: str
    seed: int
    test_accuracy: float
    test_loss: float
    model_divergence: float
    eigenvalue: float


def split_indices(
    labels: Array, *, train_images: int, seed: int
) -> tuple[Array, Array, Array]:
    """Indices of the training, validation and test images.

    All three are disjoint and stratified. The test images are the same for all seeds.
    """
    pool, test = train_test_split(
        np.arange(len(labels)),
        test_size=TEST_IMAGES,
        stratify=labels,
        random_state=TEST_SPLIT_SEED,
    )
    train, validation = train_test_split(
        pool, train_size=train_images, stratify=labels[pool], random_state=seed
    )
    return train, validation, test


def load_split(*, train_images: int, seed: int) -> Split:
    """The digits, split by `split_indices`."""
    digits = load_digits()
    images = digits.images.astype("float32")[..., None] / 16
    labels = digits.target
    indices = split_indices(labels, train_images=train_images, seed=seed)
    return Split(*(array[i] for i in indices for array in (images, labels)))


def small_cnn() -> keras.Model:
    """Three convolutions of 16, 32 and 32 channels: images to logits, all zero yet."""

    def convolution(filters: int) -> keras.Layer:
        return keras.layers.Conv2D(
            filters, 3, padding="same", activation="relu", kernel_initializer="zeros"
        )

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            convolution(16),
            convolution(32),
            keras.layers.MaxPooling2D(),
            convolution(32),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(NUM_CLASSES, kernel_initializer="zeros"),
        ]
    )


def initial_weights(model: keras.Model, seed: int) -> list[Array]:
    """Normal kernels of variance 2 / fan-in and zero biases, equal on all backends.

    Reference: [He et al., 2015](https://arxiv.org/abs/1502.01852), Equation 10.
    """
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=v.shape) * np.sqrt(2 / np.prod(v.shape[:-1]))
        if len(v.shape) > 1
        else np.zeros(v.shape)
        for v in model.weights
    ]


def steps_per_epoch(train_images: int) -> int:
    """Batches in one epoch; a remainder is left out, so that all have one shape."""
    return max(1, train_images // BATCH_SIZE)


def alpha_of(arm: str, settings: Settings) -> float:
    """Weight of the model divergence in an arm."""
    return 0.0 if arm == NRS_ALPHA_0 else settings.alpha


def compiled_model(arm: str, settings: Settings) -> keras.Model:
    """The compiled model of an arm, wrapped unless the arm is a baseline."""
    check_choice("arm", arm, ARMS)
    steps = settings.epochs * steps_per_epoch(settings.train_images)
    model = small_cnn()
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps),
            weight_decay=settings.weight_decay,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        loss_weights=2.0 if arm == TWICE_THE_LOSS else 1.0,
    )
    if arm in (BASELINE, TWICE_THE_LOSS):
        return model
    return keras_nrs.wrap(
        model,
        eps=settings.eps,
        alpha=alpha_of(arm, settings),
        scheme="rpr" if arm == RPR else "nrs",
        perturbation="relative",
    )


def base_model(model: keras.Model) -> keras.Model:
    """The network itself, whether wrapped or not."""
    if isinstance(model, keras_nrs.NRSModel):
        return keras_nrs.unwrap(model)
    return model


def reset(
    model: keras.Model, seed: int, weights: Sequence[Array] | None = None
) -> None:
    """Take a model back to its first step, without compiling it again.

    Args:
        model: Compiled, wrapped or not.
        seed: Of the perturbations and, without `weights`, of `initial_weights`.
        weights: Initial weights.
    """
    base = base_model(model)
    base.set_weights(initial_weights(base, seed) if weights is None else weights)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
    if isinstance(model, keras_nrs.NRSModel):
        state = model.seed_generator.state
        state.assign(np.array([seed, 0], keras.backend.standardize_dtype(state.dtype)))


def batches(x: Array, y: Array, *, seed: int) -> Iterator[tuple[Array, Array]]:
    """Endless batches, in an order that depends on nothing but the seed."""
    rng = np.random.default_rng(seed)
    size = min(BATCH_SIZE, len(x))
    while True:
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            batch = order[start : start + size]
            yield x[batch], y[batch]


def train(
    model: keras.Model,
    split: Split,
    *,
    epochs: int,
    seed: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> keras.callbacks.History:
    """Train a compiled model from the initial weights that belong to `seed`."""
    reset(model, seed)
    return model.fit(
        batches(split.x_train, split.y_train, seed=seed),
        steps_per_epoch=steps_per_epoch(len(split.x_train)),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def outputs(model: keras.Model, x: Array) -> Array:
    """What a model gives in inference mode, in float64."""
    result = keras.ops.convert_to_numpy(model(x, training=False))
    return np.asarray(result, "float64")


def accuracy_and_loss(model: keras.Model, x: Array, y: Array) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy in nats, in inference mode."""
    logits = outputs(base_model(model), x)
    chosen = log_softmax(logits, axis=1)[np.arange(len(y)), y]
    return float(np.mean(logits.argmax(axis=1) == y)), float(-np.mean(chosen))


def mean_model_divergence(model: keras.Model, x: Array, *, eps: float) -> float:
    """Mean of d(theta, theta + delta) over random delta, in nats.

    In inference mode, and for every arm with the same perturbation: `NUM_DELTAS`
    draws of `RelativeBall`, equal for all models up to the norm of theta.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Definition 2.
    """
    model = base_model(model)
    perturbation = keras_nrs.perturbations.RelativeBall()
    divergence = keras_nrs.divergences.CategoricalKL(from_logits=True)
    theta = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    clean = keras.ops.convert_to_tensor(outputs(model, x).astype("float32"))
    values = []
    for seed in range(NUM_DELTAS):
        deltas = perturbation.sample(theta, eps, seed)
        perturbed = [w + delta for w, delta in zip(theta, deltas, strict=True)]
        logits, _ = model.stateless_call(perturbed, state, x, training=False)
        values.append(float(keras.ops.convert_to_numpy(divergence(clean, logits))))
    return float(np.mean(values))


def last_layer_eigenvalue(features: Array, logits: Array) -> float:
    """Largest eigenvalue of the Hessian of the cross-entropy in the last layer.

    For features H with a column of ones and probabilities P the Hessian-vector
    product is, exactly, `H^T R / n` with `Z = H V` and
    `R = P * (Z - sum(P * Z, axis=1))`.

    Args:
        features: Shape `(n, d)`, the input of the last Dense layer.
        logits: Shape `(n, num_classes)`, its output.

    Returns:
        The eigenvalue for kernel and bias together, in nats per squared weight.
    """
    inputs = np.column_stack([features, np.ones(len(features))])
    probabilities = softmax(logits, axis=1)
    shape = inputs.shape[1], logits.shape[1]

    def product(vector: Array) -> Array:
        change = inputs @ vector.reshape(shape)
        mean = np.sum(probabilities * change, axis=1, keepdims=True)
        return (inputs.T @ (probabilities * (change - mean)) / len(inputs)).ravel()

    size = shape[0] * shape[1]
    hessian = LinearOperator((size, size), matvec=product, dtype="float64")
    start = np.random.default_rng(0).standard_normal(size)
    values = eigsh(hessian, k=1, which="LA", v0=start, return_eigenvectors=False)
    return float(values[0])


def measure(model: keras.Model, split: Split, settings: Settings) -> dict[str, float]:
    """The measurements of a `Run`, by name."""
    model = base_model(model)
    accuracy, loss = accuracy_and_loss(model, split.x_test, split.y_test)
    features = keras.Model(model.inputs[0], model.layers[-1].input)
    return {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "model_divergence": mean_model_divergence(
            model, split.x_train, eps=settings.eps
        ),
        "eigenvalue": last_layer_eigenvalue(
            outputs(features, split.x_train), outputs(model, split.x_train)
        ),
    }


class RunFile:
    """Finished runs in a JSON file that is never half written.

    Args:
        path: Of the file. One that other settings wrote gets another name at the
            first `append()`.
        settings: Of the experiment.

    Raises:
        ValueError: if the file is there and was not written by this class.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self._header = asdict(settings) | {
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "keras_nrs": keras_nrs.__version__,
        }
        self.runs: list[Run] = []
        self._is_of_others = False
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            runs = [Run(**run) for run in content["runs"]]
            header = content["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`output` must be a folder for the demo's own files. Received: "
                f"output={str(path.parent)!r}, where {path.name} was written by "
                "something else. Choose another folder."
            ) from error
        self._is_of_others = header != self._header
        if not self._is_of_others:
            self.runs = runs

    def append(self, run: Run) -> None:
        """Add a run, so that the file holds all of the old runs or all of the new."""
        self.runs.append(run)
        content = {"settings": self._header, "runs": [asdict(r) for r in self.runs]}
        if self._is_of_others:
            os.replace(self.path, self._free_path())
            self._is_of_others = False
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def _free_path(self) -> Path:
        numbered = (self.path.with_suffix(f".{i}.json") for i in count(1))
        return next(path for path in numbered if not path.exists())


class _Advance(keras.callbacks.Callback):  # type: ignore[misc]
    """Moves a progress bar by one at every epoch."""

    def __init__(self, progress: Progress, task: Any) -> None:
        super().__init__()
        self._progress, self._task = progress, task

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._progress.advance(self._task)


class Experiment:
    """`seeds` runs of each arm, of which those in the output folder are finished.

    Args:
        settings: What all runs share.
        seeds: Number of runs of each arm, >= 2: a spread needs two.
        output: Folder of `runs.json`. One that other settings, another backend or
            another version wrote is kept as `runs.1.json`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:

    ```python
    runs = Experiment(Settings(epochs=20), seeds=3, output=Path("demo")).run()
    rich.print(demo_report.results_table(runs))
    ```
    """

    def __init__(self, settings: Settings, *, seeds: int, output: Path) -> None:
        check_int("seeds", seeds, minimum=2)
        if output.exists() and not output.is_dir():
            raise ValueError(
                f"`output` must be a folder. Received: output={str(output)!r}, which "
                "is a file. Choose another name."
            )
        self.settings = settings
        self._file = RunFile(output / "runs.json", settings)
        self._wanted = [(arm, seed) for arm in ARMS for seed in range(seeds)]
        self._models: dict[str, keras.Model] = {}

    @property
    def finished(self) -> list[Run]:
        """The runs that need not be done again."""
        wanted = set(self._wanted)
        return [run for run in self._file.runs if (run.arm, run.seed) in wanted]

    def run(self, console: Console | None = None) -> list[Run]:
        """Do the other runs, showing progress, and return all."""
        finished = {(run.arm, run.seed) for run in self.finished}
        missing = [pair for pair in self._wanted if pair not in finished]
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(missing) * self.settings.epochs)
            advance = _Advance(progress, task)
            for arm, pairs in groupby(missing, key=lambda pair: pair[0]):
                model = self._model(arm)
                for _, seed in pairs:
                    progress.update(task, description=f"{arm}, seed {seed}")
                    self._file.append(self._run(model, arm, seed, advance))
        return self.finished

    def _model(self, arm: str) -> keras.Model:
        """A model that no other arm needs to compile again, nor another seed."""
        key = NRS if arm == NRS_ALPHA_0 else arm
        if key not in self._models:
            self._models[key] = compiled_model(arm, self.settings)
        model = self._models[key]
        if key == NRS:
            model.alpha = alpha_of(arm, self.settings)
        return model

    def _run(
        self,
        model: keras.Model,
        arm: str,
        seed: int,
        callback: keras.callbacks.Callback,
    ) -> Run:
        settings = self.settings
        split = load_split(train_images=settings.train_images, seed=seed)
        train(model, split, epochs=settings.epochs, seed=seed, callbacks=[callback])
        return Run(arm=arm, seed=seed, **measure(model, split, settings))
