"""NRS and its controls on scikit-learn's handwritten digits: `keras-nrs demo`.

A small network is trained on few images in five ways, the arms. For each seed the arms
share split, initial weights and batches, so that they can be compared in pairs. All of
it takes minutes on a laptop.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
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
from keras_nrs._checks import check_number
from keras_nrs._checks import check_positive
from keras_nrs._checks import check_seed
from keras_nrs._checks import check_share
from keras_nrs._run_store import Row
from keras_nrs._run_store import RunStore

try:
    from scipy.special import log_softmax
    from sklearn.model_selection import train_test_split

    from keras_nrs import flatness
    from keras_nrs._digits import NUM_CLASSES
    from keras_nrs._digits import load_digits
    from keras_nrs._digits import pool_and_test
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

MAX_TRAIN_IMAGES = 900
BATCH_SIZE = 25
NUM_DELTAS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all arms and seeds of an experiment share.

    Args:
        train_images: Number of training images, from 10 to 900. The other images of
            the pool of 1,000 are the validation split.
        epochs: Passes over the training images, >= 1.
        learning_rate: AdamW's, at the first step; a cosine takes it to zero.
        weight_decay: AdamW's, which multiplies it by the learning rate, >= 0.
        eps: Norm of delta relative to the norm of the weights, >= 0.
        alpha: Weight of the model divergence, >= 0.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    train_images: int = 100
    epochs: int = 100
    # Chosen by `KERAS_BACKEND=jax python -m studies.tune_demo`: the best of 20 for the
    # baseline (validation accuracy 92.65 %), then the best of 20 for NRS (93.43 %). All
    # 16 settings with eps >= 0.2 reached between 92.89 and 93.43 %.
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    eps: float = 0.5
    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_int("train_images", self.train_images, minimum=NUM_CLASSES)
        if self.train_images > MAX_TRAIN_IMAGES:
            raise ValueError(
                f"`train_images` must be <= {MAX_TRAIN_IMAGES}, to leave images for "
                f"validation. Received: train_images={self.train_images}."
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
    """The measurements of one trained network.

    Attributes:
        arm: One of `ARMS`.
        seed: Seed of the split, the initial weights, the batches and the perturbations.
        test_accuracy: Share of the test images, in [0, 1].
        test_loss: Mean cross-entropy of the test images, in nats.
        model_divergence: Mean model divergence on the training images, in nats.
        eigenvalue: Largest eigenvalue of the last layer's Hessian on the training
            images, in nats per squared weight.
    """

    arm: str
    seed: int
    test_accuracy: float
    test_loss: float
    model_divergence: float
    eigenvalue: float

    def __post_init__(self) -> None:
        check_choice("arm", self.arm, ARMS)
        check_seed("seed", self.seed)
        check_share("test_accuracy", self.test_accuracy)
        for name in ("test_loss", "model_divergence", "eigenvalue"):
            check_number(name, getattr(self, name))


def split_indices(
    labels: Array, *, train_images: int, seed: int
) -> tuple[Array, Array, Array]:
    """Indices of the training, validation and test images.

    The three parts are disjoint and stratified. All seeds share the test images.
    """
    pool, test = pool_and_test(labels)
    train, validation = train_test_split(
        pool, train_size=train_images, stratify=labels[pool], random_state=seed
    )
    return train, validation, test


def load_split(*, train_images: int, seed: int) -> Split:
    """The digits, split by `split_indices`."""
    images, labels = load_digits()
    indices = split_indices(labels, train_images=train_images, seed=seed)
    return Split(*(array[i] for i in indices for array in (images, labels)))


def small_cnn(
    input_shape: tuple[int, ...] = (8, 8, 1), num_classes: int = NUM_CLASSES
) -> keras.Model:
    """Convolutions of 16, 32 and 32 channels and a head that returns logits.

    Args:
        input_shape: `(height, width, channels)` of images, or `(length, channels)` of
            sequences.
        num_classes: Number of logits.
    """
    layers = keras.layers
    is_image = len(input_shape) == 3
    convolution = layers.Conv2D if is_image else layers.Conv1D
    pooling = layers.MaxPooling2D if is_image else layers.MaxPooling1D
    options = {
        "padding": "same",
        "activation": "relu",
        "kernel_initializer": "he_normal",
    }
    return keras.Sequential(
        [
            keras.Input(input_shape),
            convolution(16, 3, **options),
            convolution(32, 3, **options),
            pooling(),
            convolution(32, 3, **options),
            pooling(),
            layers.Flatten(),
            layers.Dense(num_classes),
        ]
    )


def initial_weights(model: keras.Model, seed: int) -> list[Array]:
    """Zero biases and normal kernels of variance 2 / fan-in, equal on all backends.

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
    """Batches in an epoch. Left-over images are dropped: all batches have one shape."""
    return max(1, train_images // BATCH_SIZE)


def alpha_of(arm: str, settings: Settings) -> float:
    """Weight of the model divergence in an arm."""
    return 0.0 if arm == NRS_ALPHA_0 else settings.alpha


def crossentropy() -> keras.losses.Loss:
    """The loss of all arms, for integer labels."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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
        crossentropy(),
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
        normalize=False,
    )


def base_model(model: keras.Model) -> keras.Model:
    """The network inside a model that may be wrapped."""
    return keras_nrs.unwrap(model) if isinstance(model, keras_nrs.NRSModel) else model


def reset(
    model: keras.Model, seed: int, weights: Sequence[Array] | None = None
) -> None:
    """Take a model back to its first step, without compiling it again.

    Args:
        model: A compiled model, wrapped or not.
        seed: Seed of the perturbations and of the initial weights.
        weights: Other initial weights than `initial_weights`.
    """
    base = base_model(model)
    base.set_weights(initial_weights(base, seed) if weights is None else weights)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
    if isinstance(model, keras_nrs.NRSModel):
        state = model.seed_generator.state
        state.assign(np.array([seed, 0], keras.backend.standardize_dtype(state.dtype)))


def batches(x: Array, y: Array, *, seed: int) -> Iterator[tuple[Array, Array]]:
    """Endless batches, in an order that depends only on the seed."""
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
    """Train a compiled model from the initial weights of a seed."""
    reset(model, seed)
    return model.fit(
        batches(split.x_train, split.y_train, seed=seed),
        steps_per_epoch=steps_per_epoch(len(split.x_train)),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def accuracy_and_loss(model: keras.Model, x: Array, y: Array) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy in nats, in inference mode."""
    outputs = base_model(model)(x, training=False)
    logits = np.asarray(keras.ops.convert_to_numpy(outputs), "float64")
    chosen = log_softmax(logits, axis=1)[np.arange(len(y)), y]
    return float(np.mean(logits.argmax(axis=1) == y)), float(-np.mean(chosen))


def measure(model: keras.Model, split: Split, settings: Settings) -> dict[str, float]:
    """The measurements of a `Run`, by name.

    All arms are measured with the same perturbation, `"relative"`.

    Args:
        model: A trained model, wrapped or not, compiled with `crossentropy()` of weight
            1: the Hessian is the compiled loss's.
        split: Gives test images, and training images for the flatness.
        settings: Gives the size of the perturbations.
    """
    model = base_model(model)
    accuracy, loss = accuracy_and_loss(model, split.x_test, split.y_test)
    batch_size = len(split.x_train)
    divergence = flatness.model_divergence(
        model,
        split.x_train,
        eps=settings.eps,
        perturbation="relative",
        num_samples=NUM_DELTAS,
        batch_size=batch_size,
    )
    hessian = flatness.hessian_eigenvalues(
        model, split.x_train, split.y_train, batch_size=batch_size
    )
    return {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "model_divergence": divergence.mean,
        "eigenvalue": float(hessian.eigenvalues[0]),
    }


class Experiment:
    """Runs each arm with `seeds` seeds, except those finished in the output folder.

    Args:
        settings: Settings that all runs share.
        seeds: Number of runs of each arm, >= 2: a spread needs two.
        output: Folder of `runs.json`. A file with other settings, or from another
            backend or version, is kept as `runs.1.json`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
        DamagedFileError: if `runs.json` cannot be right.
        InUseError: by `run()`, if another process writes to the folder.

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
        self._wanted = [(arm, seed) for arm in ARMS for seed in range(seeds)]
        self._models: dict[str, keras.Model] = {}
        # The loss weight of "twice the loss" would double its eigenvalue.
        self._measured = small_cnn()
        self._measured.compile(loss=crossentropy())
        versions = {
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "keras_nrs": keras_nrs.__version__,
        }
        path, shared = output / "runs.json", asdict(settings) | versions
        self._store = RunStore(
            path, ("arm", "seed"), shared, check_row=lambda row: Run(**row)
        )

    @property
    def finished(self) -> list[Run]:
        """The runs that need not be done again."""
        runs = [Run(**row) for row in self._store.rows]
        return [run for run in runs if (run.arm, run.seed) in self._wanted]

    def run(self, console: Console | None = None) -> list[Run]:
        """Do the missing runs, showing progress, and return all runs."""
        with self._store.locked():
            return self._run_missing(console)

    def _run_missing(self, console: Console | None) -> list[Run]:
        finished = {(run.arm, run.seed) for run in self.finished}
        missing = [pair for pair in self._wanted if pair not in finished]
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(missing) * self.settings.epochs)
            advance = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: progress.advance(task)
            )
            for arm, seed in missing:
                progress.update(task, description=f"{arm}, seed {seed}")
                run = partial(self._run, arm, seed, advance)
                self._store.get({"arm": arm, "seed": seed}, run)
        return self.finished

    def _model(self, arm: str) -> keras.Model:
        """The model of an arm, compiled once for all seeds and both NRS arms."""
        key = NRS if arm == NRS_ALPHA_0 else arm
        if key not in self._models:
            self._models[key] = compiled_model(arm, self.settings)
        model = self._models[key]
        if key == NRS:
            model.alpha = alpha_of(arm, self.settings)
        return model

    def _run(self, arm: str, seed: int, callback: keras.callbacks.Callback) -> Row:
        settings, model = self.settings, self._model(arm)
        split = load_split(train_images=settings.train_images, seed=seed)
        train(model, split, epochs=settings.epochs, seed=seed, callbacks=[callback])
        self._measured.set_weights(base_model(model).get_weights())
        return measure(self._measured, split, settings)
