"""What Keras promises of `fit()`, `evaluate()`, `predict()` and callbacks.

Each promise is kept by plain Keras and by three wrapped models that must do the same:
one of scheme `"baseline"` and one in which nothing is perturbed, bit for bit, and one
that runs the perturbed pass with a delta of 0 and halves the doubled loss.
"""

import csv
import functools
import json
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation

WRAPPED: dict[str, dict[str, Any]] = {
    "baseline": {"scheme": "baseline"},
    "nothing perturbed": {"alpha": 0.0, "beta": 0.0},
    "delta of 0": {"eps": 0.0, "normalize": True},
}
# What training logs have besides plain Keras's.
OWN_LOGS = {"model_divergence", "perturbed_loss"}
RNG = np.random.default_rng(5)
Y = RNG.integers(0, 3, 24).astype("int32")
X = (RNG.normal(size=(24, 4)) + Y[:, None]).astype("float32")
WEIGHT = RNG.uniform(0.5, 2.0, 24).astype("float32")


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class LargestLogit(keras.metrics.Metric):
    """A metric with a state of its own."""

    def __init__(self, name: str = "largest", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        largest = keras.ops.max(y_pred)
        self.largest.assign(keras.ops.maximum(self.largest, largest))

    def result(self) -> Any:
        return keras.ops.copy(self.largest.value)


def classifier() -> keras.Model:
    """With dropout, BatchNorm, and every kind of metric."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="tanh"),
            layers.BatchNormalization(momentum=0.8),
            layers.Dropout(0.3, seed=1),
            layers.Dense(3),
        ]
    )
    compile_classifier(
        model,
        optimizer=keras.optimizers.Adam(0.02),
        metrics=["accuracy", LargestLogit()],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    return model


class Trained:
    """A compiled model, used again and again from the state in which it was made."""

    def __init__(self, model: keras.Model, **wrapped: Any) -> None:
        self.model = keras_nrs.wrap(model, seed=0, **wrapped) if wrapped else model
        self.model.optimizer.build(model.trainable_variables)
        # The metrics are built at the first batch.
        self.model.train_on_batch(X[:8], Y[:8])
        self.variables = [*self.model.variables, *self.model.optimizer.variables]
        self.start()
        self.first = numpy_values(self.variables)

    def start(self) -> keras.Model:
        if hasattr(self, "first"):
            for variable, value in zip(self.variables, self.first, strict=True):
                variable.assign(value)
        self.model.reset_metrics()
        self.model._initial_epoch = None  # `BackupAndRestore` leaves it behind.
        keras.utils.set_random_seed(7)
        return self.model

    @property
    def state(self) -> list[np.ndarray]:
        base = getattr(self.model, "base_model", self.model)
        return numpy_values([*base.variables, *base.optimizer.variables])


@functools.cache
def shared(name: str | None) -> Trained:
    keras.utils.set_random_seed(0)
    return Trained(classifier(), **(WRAPPED[name] if name else {}))


def assert_same(name: str, got: Any, expected: Any) -> None:
    """Equal results: histories, logs, or arrays."""
    if isinstance(expected, dict):
        assert set(expected) == set(got) - OWN_LOGS
        for key, value in expected.items():
            assert_same(name, got[key], value)
    elif isinstance(expected, list | tuple):
        got = got[: len(expected)]  # `train_on_batch()` gives its own logs last.
        for one, other in zip(got, expected, strict=True):
            assert_same(name, one, other)
    elif name == "delta of 0":
        # Six steps, of some hundred roundings each, and Adam amplifies small
        # gradients' errors.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(got, expected)


def batches(size: int = 8) -> Iterator[Any]:
    while True:
        for start in range(0, 24, size):
            batch = slice(start, start + size)
            yield X[batch], Y[batch], WEIGHT[batch]


class AtBoundaries(keras.callbacks.Callback):
    """Reads and changes the model between batches and epochs."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        model = getattr(self.model, "base_model", self.model)
        bias = model.layers[-1].bias
        bias.assign(bias * 0.5)
        if batch == 1:
            model.optimizer.learning_rate = 0.005

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(self.model.evaluate(X, Y, batch_size=8, verbose=0))
        self.seen.append(self.model.predict(X, batch_size=8, verbose=0))


class StopAt(keras.callbacks.Callback):
    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.stop)

    def stop(self, number: int, logs: Any = None) -> None:
        if number == 1:
            self.model.stop_training = True
            self.model.stop_evaluating = True
            self.model.stop_predicting = True


class Hooks(keras.callbacks.Callback):
    """Which hooks are called, with which logs."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []
        for when in ("begin", "end"):
            for what in ("train", "test", "predict"):
                self.watch(f"on_{what}_{when}")
                self.watch(f"on_{what}_batch_{when}")
            self.watch(f"on_epoch_{when}")

    def watch(self, hook: str) -> None:
        def call(*args: Any, logs: Any = None) -> None:
            numbers = [a for a in args if isinstance(a, int)]
            logs = next((a for a in args if isinstance(a, dict)), logs)
            self.called.append((hook, numbers, sorted(set(logs or {}) - OWN_LOGS)))

        setattr(self, hook, call)


def fit(model: keras.Model, **kwargs: Any) -> dict[str, Any]:
    arguments = {"x": X, "y": Y, "batch_size": 8, "epochs": 2, "verbose": 0}
    history = model.fit(**(arguments | kwargs))
    return {**history.history, "epoch": history.epoch}


def fit_generator(model: keras.Model, **kwargs: Any) -> Any:
    return fit(model, x=batches(), y=None, batch_size=None, shuffle=False, **kwargs)


def fit_twice(model: keras.Model) -> Any:
    return [fit(model, epochs=1), fit(model, epochs=2, initial_epoch=1)]


def fit_with_changes_at_boundaries(model: keras.Model) -> Any:
    callback = AtBoundaries()
    return [fit(model, callbacks=[callback]), callback.seen]


def hooks_of(method: str, model: keras.Model) -> Any:
    hooks = Hooks()
    inputs = {"x": X} if method == "predict" else {"x": X, "y": Y}
    validation = {"validation_split": 1 / 3} if method == "fit" else {}
    getattr(model, method)(
        **inputs, batch_size=8, callbacks=[hooks], verbose=0, **validation
    )
    # As text: names rather than numbers are compared.
    return np.array([json.dumps(call) for call in hooks.called])


def stopped(method: str, hook: str, model: keras.Model) -> Any:
    callback, inputs = StopAt(hook), {"x": X}
    if method == "fit":
        return fit(model, epochs=4, callbacks=[callback])
    if method == "evaluate":
        inputs["y"] = Y
    return getattr(model, method)(
        **inputs, batch_size=8, callbacks=[callback], verbose=0
    )


def steps_on_batches(model: keras.Model) -> Any:
    first, last = slice(0, 8), slice(8, 16)
    results: list[Any] = [
        model.train_on_batch(X[first], Y[first]),
        model.train_on_batch(
            X[last], Y[last], sample_weight=WEIGHT[last], return_dict=True
        ),
        model.train_on_batch(X[last], Y[last], class_weight={0: 1, 1: 2, 2: 3}),
    ]
    model.reset_metrics()
    results += [
        model.test_on_batch(X[first], Y[first]),
        model.test_on_batch(
            X[last], Y[last], sample_weight=WEIGHT[last], return_dict=True
        ),
        model.predict_on_batch(X[first]),
    ]
    return results


def evaluations(model: keras.Model) -> Any:
    evaluate = functools.partial(model.evaluate, batch_size=8, verbose=0)
    return [
        evaluate(X, Y),
        evaluate(X, Y, sample_weight=WEIGHT, return_dict=True),
        evaluate(X, Y, steps=2),
        model.evaluate(batches(), steps=3, verbose=0, return_dict=True),
    ]


def predictions(model: keras.Model) -> Any:
    return [
        model.predict(X, batch_size=8, verbose=0),
        model.predict(X, batch_size=8, steps=2, verbose=0),
        model.predict(batches(), steps=4, verbose=0),
    ]


VALIDATION = {"validation_data": (X[:16], Y[:16]), "validation_batch_size": 8}
ACTIONS: dict[str, Callable[[Any], Any]] = {
    "shuffled": fit,
    "class_weight": lambda m: fit(m, class_weight={0: 1.0, 1: 0.5, 2: 2.0}),
    "sample_weight": lambda m: fit(m, sample_weight=WEIGHT),
    "validation_split": lambda m: fit(m, validation_split=1 / 3, sample_weight=WEIGHT),
    "validation_freq": lambda m: fit(m, epochs=3, validation_freq=2, **VALIDATION),
    "validation at epochs": lambda m: fit(
        m, epochs=3, validation_freq=[1, 3], **VALIDATION
    ),
    "weighted validation": lambda m: fit(
        m, validation_data=(X, Y, WEIGHT), validation_batch_size=8, validation_steps=2
    ),
    "steps_per_epoch": lambda m: fit_generator(m, steps_per_epoch=2),
    "generators": lambda m: fit_generator(
        m, steps_per_epoch=3, validation_data=batches(), validation_steps=2
    ),
    "few steps of arrays": lambda m: fit(m, steps_per_epoch=2),
    "twice": fit_twice,
    "changes at boundaries": fit_with_changes_at_boundaries,
    "hooks of fit": functools.partial(hooks_of, "fit"),
    "hooks of evaluate": functools.partial(hooks_of, "evaluate"),
    "hooks of predict": functools.partial(hooks_of, "predict"),
    "stopped at a batch": functools.partial(stopped, "fit", "on_train_batch_end"),
    "stopped at an epoch": functools.partial(stopped, "fit", "on_epoch_end"),
    "stopped evaluate": functools.partial(stopped, "evaluate", "on_test_batch_end"),
    "stopped predict": functools.partial(stopped, "predict", "on_predict_batch_end"),
    "on batches": steps_on_batches,
    "evaluate": evaluations,
    "predict": predictions,
}


@functools.cache
def in_keras(action: str) -> tuple[Any, list[np.ndarray]]:
    trained = shared(None)
    result = ACTIONS[action](trained.start())
    return result, trained.state


# Keras warns where data ends within an epoch, as it should.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("action", ACTIONS)
def test_as_in_keras(action: str, name: str) -> None:
    expected, expected_state = in_keras(action)
    trained = shared(name)
    result = ACTIONS[action](trained.start())
    if "hooks" in action:
        np.testing.assert_array_equal(result, expected)
    else:
        assert_same(name, result, expected)
    assert_same(name, trained.state, expected_state)


# Models of other kinds.


def both(make: Callable[[], keras.Model], action: Callable[[Any], Any]) -> None:
    """The same results and weights, bare, as a baseline and with a delta of 0."""

    def outcome(**wrapped: Any) -> Any:
        keras.utils.set_random_seed(0)
        model = make()
        result = action(keras_nrs.wrap(model, seed=0, **wrapped) if wrapped else model)
        return result, numpy_values(model.variables + model.optimizer.variables)

    expected = outcome()
    for name in ("baseline", "delta of 0"):
        assert_same(name, outcome(**WRAPPED[name]), expected)


def nested(**kwargs: Any) -> keras.Model:
    """Inputs in a dict with a list, and two outputs by name."""
    inputs = {
        "left": keras.Input((4,), name="left"),
        "right": [keras.Input((2,), name="right_0"), keras.Input((2,), name="right_1")],
    }
    hidden = layers.Concatenate()(
        [layers.Dense(3)(i) for i in keras.tree.flatten(inputs)]
    )
    outputs = {
        "kind": layers.Dense(3, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = keras.Model(inputs, outputs)
    losses = {
        "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "size": "mse",
    }
    model.compile(**{"optimizer": "rmsprop", "loss": losses} | kwargs)
    return model


NESTED_X = {"left": X, "right": [X[:, :2], X[:, 2:]]}
NESTED_Y = {"kind": Y, "size": X[:, :1] ** 2}


def test_nested_inputs_and_outputs_with_losses_by_name() -> None:
    weights = {"kind": 0.5, "size": 2.0}

    def train(model: keras.Model) -> Any:
        history = fit(model, x=NESTED_X, y=NESTED_Y, validation_split=1 / 3)
        if "perturbed_loss" not in history:
            for prefix in ("", "val_"):
                kind, size = (history[f"{prefix}{n}_loss"] for n in weights)
                total = 0.5 * np.array(kind) + 2.0 * np.array(size)
                np.testing.assert_allclose(history[f"{prefix}loss"], total, rtol=1e-5)
        assert "kind_accuracy" in history and "size_mae" in history
        weighted = {"kind": WEIGHT[:8], "size": WEIGHT[8:16]}
        batch = keras.tree.map_structure(lambda t: t[:8], (NESTED_X, NESTED_Y))
        logs = model.train_on_batch(*batch, sample_weight=weighted, return_dict=True)
        prediction = model.predict(NESTED_X, batch_size=8, verbose=0)
        return [history, logs, prediction]

    make = functools.partial(
        nested, loss_weights=weights, metrics={"kind": ["accuracy"], "size": ["mae"]}
    )
    both(make, train)


# As Keras says of it.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_an_output_without_a_loss() -> None:
    make = functools.partial(nested, loss={"kind": None, "size": "mse"})
    both(make, lambda m: fit(m, x=NESTED_X, y={"size": NESTED_Y["size"]}, epochs=1))


def test_freezing_and_compiling_again() -> None:
    """What is trainable is looked up when compiled, and frozen weights stay."""

    def train(model: keras.Model) -> Any:
        base = getattr(model, "base_model", model)
        histories = [fit(model, epochs=1)]
        base.layers[0].trainable = False
        frozen = base.layers[0].get_weights()
        compile_classifier(model, optimizer="rmsprop", metrics=[])
        histories.append(fit(model, epochs=1))
        assert_equal(base.layers[0].get_weights(), frozen)
        assert len(model.trainable_variables) == len(base.trainable_variables) == 4
        base.layers[0].trainable = True
        compile_classifier(model, metrics=["accuracy"])
        histories.append(fit(model, epochs=1))
        assert not np.array_equal(base.layers[0].get_weights()[0], frozen[0])
        return histories

    both(classifier, train)


@pytest.mark.not_torch  # Keras has no steps_per_execution there.
def test_steps_per_execution_and_its_hooks() -> None:
    """Three batches in executions of two: hooks are called for executions."""

    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        compile_classifier(model, steps_per_execution=2)
        return model

    def train(model: keras.Model) -> Any:
        ends: list[Any] = []
        callback = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(batch)
        )
        result = fit(model, callbacks=[callback], validation_split=0.5)
        return [result, ends, model.predict(X, batch_size=8, verbose=0)]

    both(make, train)


def test_constraints_hold_after_each_step() -> None:
    def make() -> keras.Model:
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, kernel_constraint="unit_norm")]
        )
        compile_classifier(model)
        return model

    def train(model: keras.Model) -> Any:
        history = fit(model)
        norms = np.linalg.norm(model.get_weights()[0], axis=0)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)
        return history

    both(make, train)


def perturbed() -> Any:
    """A shared model in which delta is not 0."""
    trained = _perturbed()
    trained.model.eps = 0.3
    return trained.start()


@functools.cache
def _perturbed() -> Trained:
    keras.utils.set_random_seed(0)
    model = classifier()
    return Trained(model, perturbation=FixedPerturbation(), eps=0.3)


def test_metrics_start_anew_at_each_epoch() -> None:
    """Its own too: an epoch's mean does not know of the epoch before."""
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0

    class NoMoreDelta(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.eps = 0.0

    history = fit(nrs, callbacks=[NoMoreDelta()], shuffle=False)
    assert history["model_divergence"][0] > 1e-3
    # Both passes see the same; they may be rounded differently.
    assert history["model_divergence"][1] == pytest.approx(0, abs=1e-6)
    names = {"accuracy", "largest", "loss", "weighted", "epoch"}
    assert set(history) == names | OWN_LOGS


def test_train_on_batch_gives_the_logs_of_that_batch() -> None:
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0
    nrs.train_on_batch(X[:8], Y[:8])
    second = nrs.train_on_batch(X[8:16], Y[8:16], return_dict=True)
    nrs = perturbed()
    nrs.optimizer.learning_rate = 0.0
    nrs.train_on_batch(X[16:], Y[16:])
    again = nrs.train_on_batch(X[8:16], Y[8:16], return_dict=True)
    assert {name: float(log) for name, log in second.items()} == again


# Keras's callbacks.


def backup_and_restore(path: Path, nrs: Any) -> None:
    """Stopped within the second epoch, and begun again there."""

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if int(self.model.optimizer.iterations) == 6:
                raise KeyboardInterrupt

    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(path / "backup", save_freq=2)

    with pytest.raises(KeyboardInterrupt):
        fit(nrs, epochs=3, callbacks=[backup(), Interrupt()])
    perturbed()
    assert fit(nrs, epochs=3, callbacks=[backup()])["epoch"] == [1, 2]
    # Of the first epoch and the first batch of the second.
    assert int(nrs.optimizer.iterations) == 1 + 4 + 6


def csv_logger(path: Path, nrs: Any) -> None:
    history = fit(nrs, callbacks=[keras.callbacks.CSVLogger(path / "log.csv")])
    with (path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= set(history)
    for name in OWN_LOGS:
        assert [float(row[name]) for row in rows] == pytest.approx(history[name])


def early_stopping(path: Path, nrs: Any) -> None:
    """The best epoch is the first, before its weights are spoiled."""
    weights: list[Any] = []

    def spoil(epoch: int, logs: Any = None) -> None:
        weights.append(nrs.get_weights())
        nrs.set_weights([100.0 + 0 * w for w in nrs.get_weights()])

    # In this order: the weights are kept before they are spoiled.
    history = fit(
        nrs,
        epochs=9,
        callbacks=[
            keras.callbacks.EarlyStopping(
                "perturbed_loss", mode="min", patience=2, restore_best_weights=True
            ),
            keras.callbacks.LambdaCallback(on_epoch_end=spoil),
        ],
    )
    assert len(history["loss"]) < 9
    assert nrs.stop_training
    assert np.argmin(history["perturbed_loss"]) == 0


def lambda_callback(path: Path, nrs: Any) -> None:
    logged: list[Any] = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: logged.append(set(logs))
    )
    fit(nrs, callbacks=[callback])
    assert len(logged) == 6
    assert all(logs >= OWN_LOGS for logs in logged)


def learning_rate_scheduler(path: Path, nrs: Any) -> None:
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    history = fit(nrs, callbacks=[schedule])
    assert history["learning_rate"] == pytest.approx([0.01, 0.005])


def checkpoint_of_weights(path: Path, nrs: Any) -> None:
    file = path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(
        file,
        monitor="val_loss",
        save_best_only=True,
        save_weights_only=True,
    )
    fit(nrs, callbacks=[checkpoint], epochs=1, **VALIDATION)
    weights = nrs.get_weights()
    perturbed()
    nrs.load_weights(file)
    assert_equal(nrs.get_weights(), weights)


def checkpoint_of_model(path: Path, nrs: Any) -> None:
    file = path / "{epoch}-{perturbed_loss:.1f}.keras"
    fit(nrs, callbacks=[keras.callbacks.ModelCheckpoint(file)])
    (last,) = path.glob("2-*.keras")
    loaded = keras.saving.load_model(last)
    assert_equal(loaded.get_weights(), nrs.get_weights())
    logs = [m.train_on_batch(X[:8], Y[:8], return_dict=True) for m in (nrs, loaded)]
    assert set(logs[0]) == set(logs[1])


def progress_bar(path: Path, nrs: Any) -> None:
    bar = keras.callbacks.ProgbarLogger()
    fit(nrs, callbacks=[bar], verbose=2)
    assert bar.target == 3


def reduce_lr_on_plateau(path: Path, nrs: Any) -> None:
    callback = keras.callbacks.ReduceLROnPlateau(
        "model_divergence", mode="min", factor=0.1, patience=1, min_delta=1e3
    )
    history = fit(nrs, callbacks=[callback], epochs=3)
    assert history["learning_rate"] == pytest.approx([0.02, 0.02, 0.002])


def remote_monitor(path: Path, nrs: Any) -> None:
    with mock.patch("keras.src.callbacks.remote_monitor.requests") as requests:
        history = fit(nrs, callbacks=[keras.callbacks.RemoteMonitor()], epochs=1)
    ((_, data), _) = requests.post.call_args
    sent = json.loads(data["data"])
    assert sent["perturbed_loss"] == pytest.approx(history["perturbed_loss"][0])


def tensor_board(path: Path, nrs: Any) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    board = keras.callbacks.TensorBoard(path, histogram_freq=1, update_freq=1)
    fit(nrs, callbacks=[board], **VALIDATION)
    events = event_accumulator.EventAccumulator(str(path / "train"))
    events.Reload()
    names = set(events.Tags()["tensors"])
    assert names >= {f"epoch_{name}" for name in OWN_LOGS}


def terminate_on_nan(path: Path, nrs: Any) -> None:
    terminate = keras.callbacks.TerminateOnNaN()
    with_nan = np.where(np.arange(24)[:, None] < 20, X, np.nan)
    with pytest.warns(UserWarning, match="is nan"):
        fit(nrs, x=with_nan, shuffle=False, callbacks=[terminate], epochs=5)
    assert nrs.stop_training
    assert int(nrs.optimizer.iterations) == 1 + 3


CALLBACKS = [
    backup_and_restore,
    csv_logger,
    early_stopping,
    lambda_callback,
    learning_rate_scheduler,
    checkpoint_of_weights,
    checkpoint_of_model,
    progress_bar,
    reduce_lr_on_plateau,
    remote_monitor,
    tensor_board,
    terminate_on_nan,
]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda f: f.__name__)
def test_callback(callback: Callable[..., None], tmp_path: Path) -> None:
    callback(tmp_path, perturbed())


def test_swap_ema_weights() -> None:
    """The averages are in use after each epoch, as in plain Keras."""

    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        compile_classifier(model, optimizer=optimizer)
        return model

    def train(model: keras.Model) -> Any:
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return fit(model, callbacks=[swap], validation_split=1 / 3)

    both(make, train)
