"""Trainings of recipes, whole and interrupted."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

import keras_nrs
from keras_nrs.data import ImageData
from keras_nrs.experiments import recipes
from keras_nrs.experiments import training
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import with_settings
from keras_nrs.experiments.training import Training

# A network with BatchNorm and dropout, whose recipe trains for 3 epochs of 7 steps.
SCRIPT = """
import os, sys, keras
from pathlib import Path
from keras import layers
from keras_nrs.experiments import recipes, training

def small(shape, classes):
    stack = [keras.Input(shape), layers.Conv2D(4, 3), layers.BatchNormalization(),
             layers.ReLU(), layers.Flatten(), layers.Dropout(0.3)]
    return keras.Sequential([*stack, layers.Dense(classes)])

recipes.NETWORKS["small"] = small
recipe = recipes.Recipe(
    network="small", dataset="digits", augmentation="basic", batch_size=100, epochs=3,
    perturbation="relative", eps=0.3, validation_percent=0, learning_rate=0.05,
    optimizer=sys.argv[4], steps_per_epoch=7)
folder, data_dir, killed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "kill"

def on_train_batch_end(self, batch, logs=None):
    if killed and len(self._history) == 1 and batch == 5:
        os.kill(os.getpid(), 9)

training._SaveEpoch.on_train_batch_end = on_train_batch_end
training.Training(recipe, 0, folder, data_dir).run()
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    tfds.load("digits", data_dir=folder)
    return folder


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# On PyTorch, whose processes begin soonest. On each backend a test of saving goes on in
# a new process.
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param("adam", marks=pytest.mark.only_torch),
        pytest.param("sgd", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, data_dir: str, optimizer: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run_script(str(whole), data_dir, "run", optimizer)
    assert result.returncode == 0, result.stderr
    result = run_script(str(killed), data_dir, "kill", optimizer)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (killed / "summary.json").exists()
    assert len(rows(killed)) == 1
    # As if an earlier stop had come between a new checkpoint and the old one's removal.
    (killed / "checkpoint-0.keras").write_bytes(b"old")
    result = run_script(str(killed), data_dir, "run", optimizer)
    assert result.returncode == 0, result.stderr
    assert "Epoch 2/3" in result.stdout
    assert "Epoch 1/3" not in result.stdout
    models = [keras.saving.load_model(f / "model.keras") for f in (whole, killed)]
    for a, b in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
        )
    kept = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]
        for folder in (whole, killed)
    ]
    assert kept[0] == kept[1]
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, killed)]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]
    assert len(json.loads((killed / "environment.json").read_text())) == 2
    # Nothing half-written, and no second training of what is finished.
    assert not list(killed.glob(".unfinished*"))
    assert not list(killed.glob("checkpoint*"))
    before = (killed / "model.keras").stat().st_mtime_ns
    assert run_script(str(killed), data_dir, "run", optimizer).returncode == 0
    assert (killed / "model.keras").stat().st_mtime_ns == before


def digits_recipe(**changes: Any) -> Recipe:
    recipe = recipes.recipes()["digits-wide_resnet_10_1-none-nrs"]
    return dataclasses.replace(
        recipe, **({"epochs": 1, "steps_per_epoch": 2} | changes)
    )


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network that compiles soon."""

    def network(shape: tuple[int, ...], classes: int) -> keras.Model:
        head = [keras.layers.Flatten(), keras.layers.Dense(classes)]
        return keras.Sequential([keras.Input(shape), *head])

    monkeypatch.setitem(recipes.NETWORKS, "linear", network)
    return "linear"


def test_a_folder_of_another_training_is_refused(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear, flatness=False)
    Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    other = dataclasses.replace(recipe, eps=0.7)
    with pytest.raises(ValueError, match=r"another training: eps=0.4 there, 0.7 here"):
        Training(other, 0, tmp_path, data_dir)


@pytest.mark.only_torch  # Which compiles nothing. A kill is tried on each backend.
def test_a_training_until_an_epoch_is_a_part_of_the_whole_one(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(
        network=linear, epochs=3, steps_per_epoch=2, validation_percent=10
    )

    def training(name: str) -> Training:
        return Training(recipe, 0, tmp_path / name, data_dir, test=False)

    def without_costs(summary: dict[str, Any]) -> dict[str, Any]:
        names = ("training_seconds", "seconds_per_step", "peak_memory_mib")
        return {k: v for k, v in summary.items() if k not in names}

    whole = training("whole").run(verbose=0)
    parts = [training("parts").run(verbose=0, until=n) for n in (1, 2, 1, 3)]
    assert without_costs(parts[3]) == without_costs(whole)
    assert parts[0] == parts[2]
    assert [part["epochs"] for part in parts] == [1, 2, 1, 3]
    for n in (1, 2):
        later = training("whole").run(verbose=0, until=n)
        assert without_costs(later) == without_costs(parts[n - 1])
    sessions = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert len(sessions) == 3
    with pytest.raises(ValueError, match="`until` must be an integer from 1 to 3"):
        training("parts").run(until=4)
    with pytest.raises(ValueError, match="`validation_percent` must be an integer"):
        Training(digits_recipe(), 0, tmp_path / "new", data_dir, test=False)


def test_summary_has_the_last_layers_eigenvalues(tmp_path: Path, data_dir: str) -> None:
    summary = Training(digits_recipe(), 0, tmp_path, data_dir).run(verbose=0)
    assert summary["last_layer_eigenvalue_converged"]
    assert summary["last_layer_eigenvalue"] > 0
    assert summary["last_layer_kfra_eigenvalue"] > 0
    assert list((tmp_path / "tensorboard" / "train").iterdir())
    model = keras.saving.load_model(tmp_path / "model.keras")
    images, labels = zip(
        *ImageData(name="digits", data_dir=data_dir).test(), strict=True
    )
    predicted = model.predict(np.concatenate(images), verbose=0).argmax(1)
    accuracy = np.mean(predicted == np.concatenate(labels).argmax(1))
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-6)


def test_a_training_that_diverges_is_not_finished(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear, learning_rate=1e30, epochs=3, clip_norm=None)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"epoch .* lower learning_rate"):
            Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    assert not (tmp_path / "summary.json").exists()


def test_a_network_that_does_not_fit_the_images_leaves_no_files(
    tmp_path: Path, data_dir: str
) -> None:
    recipe = digits_recipe(network="imagenet_resnet50")
    with pytest.raises(training.RecipeError, match=">= 32"):
        Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    assert not list(tmp_path.iterdir())


def test_float16_has_a_loss_scale_with_both_optimizers(data_dir: str) -> None:
    for optimizer in ("sgd", "adam"):
        recipe = digits_recipe(optimizer=optimizer, dtype_policy="mixed_float16")
        model = built(recipe, data_dir)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert keras.config.dtype_policy().name == "float32"


def built(recipe: Recipe, data_dir: str) -> keras_nrs.NRSModel:
    data = ImageData(**recipe.data_settings(), data_dir=data_dir)
    return training.build(recipe, data, seed=0)


def test_sgd_has_coupled_decay_and_a_cosine_to_zero(data_dir: str) -> None:
    model = built(digits_recipe(weight_decay=0.01, epochs=3), data_dir)
    optimizer = model.optimizer
    assert optimizer.weight_decay is None
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert optimizer.global_clipnorm == 5.0
    assert len(model.base_model.losses) == len(
        [v for v in model.trainable_variables if v.name == "kernel"]
    )
    schedule = optimizer._learning_rate
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(6)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("network", ["wide_resnet_10_1", "vit_ti"])
def test_adam_decays_kernels_alone(data_dir: str, network: str) -> None:
    recipe = digits_recipe(
        network=network,
        optimizer="adam",
        learning_rate=0.1,
        weight_decay=0.5,
        epochs=4,
        warmup_epochs=1,
    )
    model = built(recipe, data_dir)
    assert not model.base_model.losses
    optimizer = model.optimizer
    decayed = [optimizer._use_weight_decay(v) for v in model.trainable_variables]
    assert decayed == [v.name == "kernel" for v in model.trainable_variables]
    assert float(optimizer._learning_rate(0)) == 0
    assert float(optimizer._learning_rate(2)) == pytest.approx(0.1)


# They say so themselves.
@pytest.mark.filterwarnings("ignore:eps=0.1 has no effect")
# The networks are smaller than the recipes': those take a minute to compile.
@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("cifar10-wide_resnet_28_10-cutout-nrs", "wide_resnet_10_1"),
        pytest.param(
            "cifar10-wide_resnet_28_10-cutout-nrs", None, marks=pytest.mark.slow
        ),
        pytest.param(
            "imagenet2012-imagenet_resnet50-flip-nrs", None, marks=pytest.mark.slow
        ),
    ],
)
def test_recipes_run_on_mocked_data(
    tmp_path: Path, name: str, network: str | None
) -> None:
    settings = ["epochs=1", "steps_per_epoch=2", "batch_size=4"]
    settings += [f"network={network}"] if network else []
    recipe = with_settings(recipes.recipes()[name], settings)
    with tfds.testing.mock_data(num_examples=8):
        summary = Training(recipe, 0, tmp_path).run(verbose=0)
    assert np.isfinite(summary["test_cross_entropy"])
    assert ("test_top_5_accuracy" in summary) == name.startswith("imagenet")
