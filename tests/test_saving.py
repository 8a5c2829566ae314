"""Saving an `NRSModel`, and going on where it was saved."""

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs import nrs_model
from tests.saved import make
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.processes import run_python

CONTINUE = """
import sys
import keras, numpy as np
bare = keras.saving.load_model(sys.argv[3])
assert type(bare) is keras.Sequential and bare.compiled
assert "keras_nrs" not in sys.modules
import keras_nrs
from tests.support.asserts import numpy_values
from tests.support.data import image_data
x, y = image_data()
nrs = keras.saving.load_model(sys.argv[1])
assert isinstance(nrs, keras_nrs.NRSModel)
nrs.fit(x, y, batch_size=16, epochs=4, initial_epoch=2, shuffle=False, verbose=0)
np.savez(sys.argv[2], *numpy_values(nrs.variables + nrs.optimizer.variables))
"""


def new() -> Any:
    """Dropout, BatchNorm, Adam, every random state that there is."""
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, seed=11, penalty=1e-3, compile=False)
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    return keras_nrs.wrap(model, eps=0.3, perturbation="relative", interval=2)


def fit(nrs: Any, epochs: int, *callbacks: Any) -> Any:
    x, y = image_data()
    nrs.fit(
        x,
        y,
        batch_size=16,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return nrs


@functools.cache
def trained(epochs: int) -> Any:
    """Shared between tests, none of which may change it."""
    return fit(new(), epochs)


def test_a_new_process_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    """And it loads the unwrapped model without keras_nrs."""
    path, bare = tmp_path / "half way.keras", tmp_path / "bare.keras"
    whole = new()

    def save(epoch: int, logs: Any) -> None:
        if epoch == 1:
            whole.save(path)
            keras_nrs.unwrap(whole).save(bare)

    fit(whole, 4, keras.callbacks.LambdaCallback(on_epoch_end=save))
    run_python(CONTINUE, path, tmp_path / "end.npz", bare)
    with np.load(tmp_path / "end.npz") as end:
        assert_equal(
            list(end.values()),
            numpy_values(whole.variables + whole.optimizer.variables),
        )


def test_a_file_of_version_0_1_0_goes_on_as_it_did() -> None:
    path = make.FOLDER / f"0.1.0-{keras.config.backend()}"
    loaded = keras.saving.load_model(f"{path}.keras")
    assert (loaded.interval, loaded.beta, loaded.normalize) == (2, 0.5, True)
    assert loaded.perturbation.radius == "sphere"
    make.train(loaded, epochs=2, initial_epoch=1)
    # On TensorFlow 0.1.0 gave steps that `interval` leaves out the moments of groups.
    if keras.config.backend() == "tensorflow":
        assert all(np.isfinite(value).all() for value in make.values(loaded))
        return
    # Machines round differently: 3 steps of a few float32 operations each. On JAX the
    # normal noise has since become finer: by 0.003, as a part of eps.
    bound = 1e-4 if keras.config.backend() == "jax" else 1e-6
    with np.load(f"{path}.npz") as expected:
        for value, array in zip(make.values(loaded), expected.values(), strict=True):
            np.testing.assert_allclose(value, array, rtol=1e-5, atol=bound)


@pytest.mark.matrix
def test_save_and_load_is_the_identity(tmp_path: Path) -> None:
    nrs = fit(new(), 1)
    nrs.eps = 0.7
    nrs.save(tmp_path / "nrs.keras")
    loaded = keras.saving.load_model(tmp_path / "nrs.keras")
    assert_equal(
        numpy_values(nrs.variables + nrs.optimizer.variables),
        numpy_values(loaded.variables + loaded.optimizer.variables),
    )
    assert nrs.get_config().keys() == loaded.get_config().keys()
    assert loaded.get_config()["eps"] == pytest.approx(0.7)
    assert loaded.interval == 2
    assert isinstance(loaded.perturbation, keras_nrs.perturbations.RelativeBall)
    x, y = image_data()
    assert nrs.evaluate(x, y, verbose=0) == loaded.evaluate(x, y, verbose=0)
    # All of it is compiled: another step is the same.
    assert nrs.train_on_batch(x, y) == loaded.train_on_batch(x, y)


@pytest.mark.matrix
def test_own_perturbation_and_divergence_are_saved(tmp_path: Path) -> None:
    nrs = keras_nrs.wrap(
        cnn(),
        perturbation=FixedPerturbation(),
        divergence=keras_nrs.divergences.CategoricalKL(from_logits=True),
    )
    nrs.train_on_batch(*image_data())
    nrs.save(tmp_path / "nrs.keras")
    loaded = keras.saving.load_model(tmp_path / "nrs.keras")
    assert isinstance(loaded.perturbation, FixedPerturbation)
    assert loaded._divergences.given.from_logits is True


@pytest.mark.matrix
def test_perturbation_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    class Own(keras_nrs.perturbations.Perturbation):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

    nrs = keras_nrs.wrap(cnn(), perturbation=Own(2.0))
    with pytest.raises(NotImplementedError, match=r"Own has .* implement get_config"):
        nrs.save(tmp_path / "nrs.keras")


@pytest.mark.matrix
def test_load_without_compiling(tmp_path: Path) -> None:
    trained(2).save(tmp_path / "nrs.keras")
    assert not keras.saving.load_model(tmp_path / "nrs.keras", compile=False).compiled


@pytest.mark.matrix
def test_weights_file(tmp_path: Path) -> None:
    nrs, path = trained(2), tmp_path / "nrs.weights.h5"
    nrs.save_weights(path)
    other = fit(new(), 1)
    other.load_weights(path)
    assert_equal(
        numpy_values(nrs.variables + nrs.optimizer.variables),
        numpy_values(other.variables + other.optimizer.variables),
    )


@pytest.mark.matrix
def test_weights_file_of_another_model(tmp_path: Path) -> None:
    keras_nrs.wrap(cnn(dropout=0.5)).save_weights(tmp_path / "nrs.weights.h5")
    with pytest.raises(ValueError, match="unwrap"):
        keras_nrs.wrap(cnn()).load_weights(tmp_path / "nrs.weights.h5")


@pytest.mark.matrix
def test_backup_and_restore(tmp_path: Path) -> None:
    """An interrupted `fit` goes on from Keras's own backup."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    def backup() -> keras.callbacks.Callback:
        return keras.callbacks.BackupAndRestore(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        fit(new(), 4, backup(), Interrupt())
    resumed = fit(new(), 4, backup())
    assert_equal(
        numpy_values(resumed.variables),
        numpy_values(trained(4).variables),
    )


@pytest.mark.matrix
def test_clone_from_config() -> None:
    cheap = keras_nrs.wrap(cnn(), perturbed_fraction=0.5, memory_efficient=True)
    for nrs in (new(), cheap):
        clone = keras_nrs.NRSModel.from_config(nrs.get_config())
        assert clone.get_config() == nrs.get_config()
        assert not clone.compiled
    assert clone.perturbed_fraction == 0.5 and clone.memory_efficient


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export(tmp_path: Path) -> None:
    """The artifact is the base model's."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    nrs = keras_nrs.wrap(model)
    if keras.config.backend() == "torch":  # whose SavedModel export needs torch_xla
        path = str(tmp_path / "nrs.pt2")
        nrs.export(path, format="torch", verbose=False)
        import torch

        program = torch.export.load(path)
        # Keras fixes the batch size of this format to 1.
        outputs = program.module()(torch.ones(1, 4)).detach().numpy()
    else:
        import tensorflow as tf

        nrs.export(str(tmp_path / "nrs"), verbose=False)
        artifact = tf.saved_model.load(str(tmp_path / "nrs"))
        try:
            outputs = artifact.serve(tf.ones((2, 4))).numpy()
        except tf.errors.InvalidArgumentError as error:
            if "deserialize" not in str(error):
                raise
            pytest.skip("This TensorFlow does not read what this JAX writes.")
    expected = model.predict(np.ones((len(outputs), 4)), verbose=0)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


@pytest.mark.matrix
def test_only_the_first_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nrs = keras_nrs.wrap(cnn())
    monkeypatch.setattr(nrs_model, "process_index", lambda model: 1)
    nrs.save(tmp_path / "model.keras")
    nrs.save_weights(tmp_path / "model.weights.h5")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    nrs.save(tmp_path / "model.keras")
    nrs.save_weights(tmp_path / "model.weights.h5")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.keras", "model.weights.h5"]
