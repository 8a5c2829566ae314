"""Trainings of recipes, whole and interrupted."""

import csv
import dataclasses
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_nrs.data import ImageData
from keras_nrs.experiments import recipes
from keras_nrs.experiments import sessions
from keras_nrs.experiments import training
from keras_nrs.experiments.recipes import with_settings
from keras_nrs.experiments.training import Training
from tests.experiments.processes import SMALL_TRAINING
from tests.experiments.processes import Script
from tests.experiments.runs import digits_recipe

SCRIPT = (
    SMALL_TRAINING
    + """
def main(folder, data_dir, mode, optimizer):
    train(folder, data_dir, mode, validation_percent=0, optimizer=optimizer,
          flatness=False)
"""
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    with Script(SCRIPT, tmp_path_factory.mktemp("outputs")) as script:
        yield script


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.matrix  # Two processes that compile the same steps.
@pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)]
)
def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, data_dir: str, script: Script, optimizer: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = script.run(str(whole), data_dir, "run", optimizer)
    assert code == 0, output
    code, output = script.run(str(killed), data_dir, "kill", optimizer)
    assert code == -signal.SIGKILL, output
    assert not (killed / "summary.json").exists()
    assert len(rows(killed)) == 1
    # As if a stop had come after a new checkpoint and before the old one's removal.
    (killed / "checkpoint-0.keras").write_bytes(b"old")
    code, output = script.run(str(killed), data_dir, "run", optimizer)
    assert code == 0, output
    assert "Epoch 2/2" in output
    assert "Epoch 1/2" not in output
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
    # No half-written files, and no second training after the end.
    assert not list(killed.glob(".unfinished*"))
    assert not list(killed.glob("checkpoint*"))
    before = (killed / "model.keras").stat().st_mtime_ns
    code, output = script.run(str(killed), data_dir, "run", optimizer)
    assert code == 0, output
    assert (killed / "model.keras").stat().st_mtime_ns == before


@pytest.mark.only_torch
def test_a_folder_of_another_training_is_refused(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear, flatness=False)
    Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    other = dataclasses.replace(recipe, eps=0.7)
    with pytest.raises(ValueError, match=r"another training: eps=0.4 there, 0.7 here"):
        Training(other, 0, tmp_path, data_dir)


@pytest.mark.only_torch
def test_a_training_of_version_0_1_0_goes_on(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear, epochs=2, flatness=False)
    for folder in (tmp_path / "new", tmp_path / "old"):
        Training(recipe, 0, folder, data_dir).run(verbose=0, until=1)
    path = tmp_path / "old" / "recipe.json"
    values = json.loads(path.read_text())
    # Version 0.1.0 had no other source.
    assert values.pop("source") == "paper"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="source='paper' there, 'released' here"):
        Training(dataclasses.replace(recipe, source="released"), 0, path.parent)
    summaries = [
        Training(recipe, 0, folder, data_dir).run(verbose=0)
        for folder in (tmp_path / "new", tmp_path / "old")
    ]
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]


@pytest.mark.only_torch
def test_a_system_without_the_module_resource(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_dir: str, linear: str
) -> None:
    try:
        with monkeypatch.context() as windows:
            windows.setitem(sys.modules, "resource", None)
            importlib.reload(sessions)
        recipe = digits_recipe(network=linear)
        summary = Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    finally:
        importlib.reload(sessions)
    assert "training_seconds" in summary
    assert "peak_memory_mib" not in summary


@pytest.mark.only_torch  # It compiles nothing. Each backend resumes after a kill.
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


@pytest.mark.only_torch
def test_summary_has_the_last_layers_eigenvalues(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear)
    summary = Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
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


@pytest.mark.only_torch
def test_a_training_that_diverges_is_not_finished(
    tmp_path: Path, data_dir: str, linear: str
) -> None:
    recipe = digits_recipe(network=linear, learning_rate=1e30, epochs=3, clip_norm=None)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"epoch .* lower learning_rate"):
            Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.only_torch
def test_a_network_that_does_not_fit_the_images_leaves_no_files(
    tmp_path: Path, data_dir: str
) -> None:
    recipe = digits_recipe(network="imagenet_resnet50")
    with pytest.raises(training.RecipeError, match=">= 32"):
        Training(recipe, 0, tmp_path, data_dir).run(verbose=0)
    assert not list(tmp_path.iterdir())


# The recipes have the paper's eps, and warn of it themselves.
@pytest.mark.filterwarnings("ignore:eps=0.1 has no effect")
# The recipes' own networks take a minute to compile.
@pytest.mark.parametrize(
    ("name", "network"),
    [
        pytest.param(
            "cifar10-wide_resnet_28_10-cutout-nrs", "linear", marks=pytest.mark.matrix
        ),
        pytest.param(
            "cifar10-wide_resnet_28_10-cutout-nrs", None, marks=pytest.mark.slow
        ),
        pytest.param(
            "imagenet2012-imagenet_resnet50-flip-nrs", None, marks=pytest.mark.slow
        ),
    ],
)
def test_recipes_run_on_mocked_data(
    tmp_path: Path, linear: str, name: str, network: str | None
) -> None:
    settings = ["epochs=1", "steps_per_epoch=2", "batch_size=4", "flatness=False"]
    settings += [f"network={network}"] if network else []
    recipe = with_settings(recipes.recipes()[name], settings)
    with tfds.testing.mock_data(num_examples=8):
        summary = Training(recipe, 0, tmp_path).run(verbose=0)
    assert np.isfinite(summary["test_cross_entropy"])
    assert ("test_top_5_accuracy" in summary) == name.startswith("imagenet")
