"""Saving, export, callbacks, and what else works on a model."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_nrs
from tests.compatibility.way import Way
from tests.compatibility.way import unwrapped
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

X, Y = image_data(32)


def in_a_directory(check: Callable[..., Any]) -> Callable[[Way], Any]:
    """Give a check a directory for its files."""

    @functools.wraps(check)
    def run(way: Way) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            return check(way, Path(directory))

    return run


def _model() -> keras.Model:
    """Everything that a run draws is seeded, so that it can be continued."""
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, seed=11, compile=False)
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    return model


def _state(model: Any) -> list[np.ndarray]:
    variables = model.variables if hasattr(model, "base_model") else model.weights
    return numpy_values([*variables, *model.optimizer.variables])


@in_a_directory
def save(way: Way, path: Path) -> None:
    """In Keras's safe mode; all steps after it are those of a model never saved."""
    trained = way.train(_model(), X, Y)
    trained.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    assert type(loaded) is type(trained)
    assert_equal(_state(loaded), _state(trained))
    assert_equal([way.predict(loaded, X)], [way.predict(trained, X)])
    for model in (loaded, trained):
        way.fit(model, X, Y)
    assert_equal(_state(loaded), _state(trained))


@in_a_directory
def save_weights(way: Way, path: Path) -> None:
    trained = way.train(_model(), X, Y)
    trained.save_weights(path / "model.weights.h5")
    other = way.wrap(_model())
    other.load_weights(path / "model.weights.h5")
    assert_equal(other.get_weights(), trained.get_weights())
    assert_equal([way.predict(other, X)], [way.predict(trained, X)])


@in_a_directory
def export_saved_model(way: Way, path: Path) -> None:
    import tensorflow as tf

    trained = way.train(_model(), X, Y)
    trained.export(str(path), verbose=False)
    exported = tf.saved_model.load(str(path))
    outputs = exported.serve(tf.constant(X)).numpy()
    np.testing.assert_allclose(outputs, way.predict(trained, X), rtol=1e-4, atol=1e-6)


@in_a_directory
def export_torch(way: Way, path: Path) -> None:
    import torch

    trained = way.train(_model(), X, Y)
    trained.export(str(path / "model.pt2"), format="torch", verbose=False)
    program = torch.export.load(str(path / "model.pt2")).module()
    # Keras fixes the batch size of this format to 1.
    outputs = program(torch.as_tensor(X[:1])).detach().numpy()
    expected = way.predict(trained, X)[:1]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)


def clone(way: Way) -> None:
    """Weights of its own, and the same options."""
    trained = way.train(_model(), X, Y)
    before = trained.get_weights()
    other = keras.models.clone_model(trained)
    assert type(other) is type(trained)
    assert not {id(v) for v in other.weights} & {id(v) for v in trained.weights}
    compile_classifier(other)
    way.fit(other, X, Y)
    way.predict(other, X)
    assert_equal(trained.get_weights(), before)


def early_stopping(way: Way) -> None:
    """The best weights come back after they were spoiled."""
    trained = way.wrap(_model())
    weights = []

    def spoil(epoch: int, logs: Any) -> None:
        weights.append(trained.get_weights())
        if epoch > 0:
            trained.set_weights([np.full_like(w, 9.0) for w in trained.get_weights()])

    stop = keras.callbacks.EarlyStopping(
        "val_loss", patience=2, start_from_epoch=0, restore_best_weights=True
    )
    callback = keras.callbacks.LambdaCallback(on_epoch_end=spoil)
    options = {"epochs": 9, "validation_data": (X, Y), "verbose": 0, "shuffle": False}
    history = trained.fit(X, Y, callbacks=[stop, callback], **options).history
    way.check_logs({k: v[:1] for k, v in history.items()})
    best = int(np.argmin(history["val_loss"]))
    assert len(weights) == best + 3 < 9
    # Spoiled in the last epoch, after the best weights were put back.
    assert stop.best_epoch == best
    assert_equal(stop.best_weights, weights[best])


@in_a_directory
def backup_and_restore(way: Way, path: Path) -> None:
    """An interrupted run that is begun again ends as one that was not."""

    def interrupt(epoch: int, logs: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    def fit(*callbacks: Any) -> Any:
        model = way.wrap(_model())
        backup = keras.callbacks.BackupAndRestore(path)
        way.fit(model, X, Y, epochs=4, callbacks=[backup, *callbacks])
        return _state(model)

    expected = fit()
    try:
        fit(keras.callbacks.LambdaCallback(on_epoch_begin=interrupt))
    except KeyboardInterrupt:
        assert_equal(fit(), expected)
    else:
        raise AssertionError("it was not interrupted")


def reduce_lr_on_plateau(way: Way) -> None:
    """On a plateau, since nothing counts as better."""
    trained = way.wrap(_model())
    callback = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.5, patience=1, min_delta=1e3
    )
    history = way.fit(trained, X, Y, epochs=3, callbacks=[callback])
    np.testing.assert_allclose(history["learning_rate"], [0.01, 0.01, 0.005])
    way.predict(trained, X)


@in_a_directory
def keras_tuner(way: Way, path: Path) -> None:
    """A search over eps and the learning rate, and the best model of it."""
    import keras_tuner

    def build(parameters: Any) -> Any:
        model = cnn(compile=False)
        rate = parameters.Choice("rate", [0.1, 0.01])
        compile_classifier(model, optimizer=keras.optimizers.SGD(rate))
        return way.wrap(model, eps=parameters.Choice("eps", [0.1, 0.3]))

    tuner = keras_tuner.RandomSearch(
        build, "val_loss", max_trials=2, directory=path, seed=0
    )
    tuner.search(X, Y, epochs=2, validation_data=(X, Y), verbose=0)
    (trial,) = tuner.oracle.get_best_trials(1)
    (best,) = tuner.get_best_models(1)
    loss, _ = best.evaluate(X, Y, verbose=0)
    np.testing.assert_allclose(loss, trial.score, rtol=1e-5)
    way.predict(best, X)
    way.fit(best, X, Y)


def flatness(way: Way) -> None:
    """The same for a wrapped model as for its own."""
    trained = way.train(_model(), X, Y)
    found = []
    for model in (trained, unwrapped(trained)):
        keras.utils.set_random_seed(0)
        eigenvalue = keras_nrs.flatness.hessian_eigenvalues(model, X, Y, seed=0)
        assert eigenvalue.converged
        found.append(float(eigenvalue.eigenvalues[0]))
    assert found[0] == found[1] and np.isfinite(found[0])
