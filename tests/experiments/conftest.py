"""Fixtures that several files of this folder use."""

from pathlib import Path

import numpy as np
import pytest

from keras_nrs.experiments.recipes import recipes
from tests.experiments.runs import linear_network
from tests.experiments.runs import write_run


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the prepared digits."""
    import tensorflow_datasets as tfds

    import keras_nrs.data  # noqa: F401

    folder = str(tmp_path_factory.mktemp("tfds"))
    tfds.load("digits", data_dir=folder)
    return folder


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network that compiles fast, for recipes."""
    from keras_nrs.experiments import recipes

    monkeypatch.setitem(recipes.NETWORKS, "linear", linear_network)
    return "linear"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Made-up runs: CIFAR-10, 3 schemes and 3 seeds; ImageNet, NRS and one seed."""
    rng, settings = np.random.default_rng(0), recipes()
    for scheme, seconds in (("baseline", 0.1), ("rpr", 0.15), ("nrs", 0.2)):
        name = f"cifar10-wide_resnet_28_10-basic-{scheme}"
        for seed in range(3):
            write_run(
                tmp_path / "runs" / name / f"seed-{seed}",
                settings[name],
                seed,
                test_accuracy=float(rng.uniform(0.9, 1)),
                test_cross_entropy=0.2,
                seconds_per_step=seconds,
                last_layer_eigenvalue=float(rng.uniform(1, 2)),
                last_layer_kfra_eigenvalue=2.0,
            )
    write_run(
        tmp_path / "runs" / "imagenet" / "seed-0",
        settings["imagenet2012-imagenet_resnet50-flip-nrs"],
        0,
        test_accuracy=0.76,
        test_top_5_accuracy=0.93,
        test_cross_entropy=1.0,
    )
    return tmp_path / "runs"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """The made-up trainings of a sweep: folder, seed, first and last epoch."""
    from keras_nrs.experiments import sweep
    from tests.experiments import sweeps

    monkeypatch.setattr(sweep, "Training", sweeps.FakeTraining)
    monkeypatch.setattr(sweeps.FakeTraining, "trained", [])
    sweeps.set_accuracy(
        monkeypatch,
        lambda recipe: 0.8 - (recipe.eps - 0.31) ** 2 - (recipe.alpha - 1) ** 2 / 9,
    )
    return sweeps.FakeTraining.trained
