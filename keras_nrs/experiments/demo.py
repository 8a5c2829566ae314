"""NRS and its controls on small image data: `keras-nrs demo`.

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

import keras
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import keras_nrs
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_number
from keras_nrs._checks import check_positive
from keras_nrs._checks import check_seed
from keras_nrs._checks import check_share
from keras_nrs._run_store import Row
from keras_nrs._run_store import RunStore
from keras_nrs.experiments.progress import RunProgress

try:
    from scipy.special import log_softmax

    from keras_nrs import flatness
    from keras_nrs._digits import NUM_CLASSES
    from keras_nrs.experiments.demo_data import DIGITS
    from keras_nrs.experiments.demo_data import FASHION_MNIST
    from keras_nrs.experiments.demo_data import MAX_TRAIN_IMAGES
    from keras_nrs.experiments.demo_data import Split
    from keras_nrs.experiments.demo_data import load_split
    from keras_nrs.experiments.demo_networks import initial_weights
    from keras_nrs.experiments.demo_networks import mlp
    from keras_nrs.experiments.demo_networks import small_cnn
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

BATCH_SIZE = 25
NUM_DELTAS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all arms and seeds of an experiment share.

    Those of the digits are the defaults, `SETTINGS` has those of each set.

    Args:
        data: `"digits"`, for which a small CNN is trained, or `"fashion-mnist"`, for
            which it is an MLP.
        train_images: Number of training images: of the digits from 10 to 900, of
            Fashion-MNIST to 50,000. Others are the validation split.
        epochs: Passes over the training images, >= 1.
        batch_size: Images in a step, >= 1.
        learning_rate: AdamW's, at the first step; a cosine takes it to zero.
        weight_decay: AdamW's, which multiplies it by the learning rate, >= 0.
        clip_norm: Global norm at which gradients are clipped, > 0 or `None`.
        eps: Norm of delta relative to the norm of the weights, >= 0.
        alpha: Weight of the model divergence, >= 0.
        normalize: As in `wrap()`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    data: str = DIGITS
    train_images: int = 100
    epochs: int = 100
    batch_size: int = BATCH_SIZE
    # Chosen by `KERAS_BACKEND=jax python -m studies.tune_demo`: the best of 20 for the
    # baseline (validation accuracy 92.65 %), then the best of 20 for NRS (93.43 %). All
    # 16 settings with eps >= 0.2 reached between 92.89 and 93.43 %.
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    clip_norm: float | None = None
    eps: float = 0.5
    alpha: float = 4.0
    normalize: bool = False

    def __post_init__(self) -> None:
        check_choice("data", self.data, MAX_TRAIN_IMAGES)
        check_int("train_images", self.train_images, minimum=NUM_CLASSES)
        most = MAX_TRAIN_IMAGES[self.data]
        if self.train_images > most:
            raise ValueError(
                f"`train_images` must be <= {most} with data={self.data!r}, to leave "
                f"images for validation. Received: train_images={self.train_images}."
            )
        check_int("epochs", self.epochs, minimum=1)
        check_int("batch_size", self.batch_size, minimum=1)
        check_positive("learning_rate", self.learning_rate)
        check_nonnegative("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_nonnegative("eps", self.eps)
        check_nonnegative("alpha", self.alpha)
        check_bool("normalize", self.normalize)


SETTINGS = {
    DIGITS: Settings(),
    # What the study chose on validation images for its task fashion-mlp-3000.
    FASHION_MNIST: Settings(
        data=FASHION_MNIST,
        train_images=3000,
        epochs=30,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.03,
        clip_norm=1.0,
        eps=0.6,
        normalize=True,
    ),
}


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


def network_of(data: str) -> keras.Model:
    """The network that is trained on a set."""
    return small_cnn() if data == DIGITS else mlp()


def steps_per_epoch(train_images: int, batch_size: int = BATCH_SIZE) -> int:
    """Batches in an epoch. Left-over images are dropped: all batches have one shape."""
    return max(1, train_images // batch_size)


def alpha_of(arm: str, settings: Settings) -> float:
    """Weight of the model divergence in an arm."""
    return 0.0 if arm == NRS_ALPHA_0 else settings.alpha


def crossentropy() -> keras.losses.Loss:
    """The loss of all arms, for integer labels."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled_model(arm: str, settings: Settings) -> keras.Model:
    """The compiled model of an arm, wrapped unless the arm is a baseline."""
    check_choice("arm", arm, ARMS)
    steps = settings.epochs * steps_per_epoch(
        settings.train_images, settings.batch_size
    )
    model = network_of(settings.data)
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps),
            weight_decay=settings.weight_decay,
            global_clipnorm=settings.clip_norm,
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
        normalize=settings.normalize,
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


def batches(
    x: Array, y: Array, *, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[Array, Array]]:
    """Endless batches, in an order that depends only on the seed."""
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(x))
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
    batch_size: int = BATCH_SIZE,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> keras.callbacks.History:
    """Train a compiled model from the initial weights of a seed."""
    reset(model, seed)
    return model.fit(
        batches(split.x_train, split.y_train, seed=seed, batch_size=batch_size),
        steps_per_epoch=steps_per_epoch(len(split.x_train), batch_size),
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
        self._measured = network_of(settings.data)
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
        with RunProgress(len(missing), self.settings.epochs, console) as progress:
            for arm, seed in missing:
                progress.start(f"{arm}, seed {seed}")
                run = partial(self._run, arm, seed, progress)
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
        split = load_split(
            train_images=settings.train_images, seed=seed, data=settings.data
        )
        train(
            model,
            split,
            epochs=settings.epochs,
            seed=seed,
            batch_size=settings.batch_size,
            callbacks=[callback],
        )
        self._measured.set_weights(base_model(model).get_weights())
        return measure(self._measured, split, settings)
