"""Across modules: SIGKILL leaves no half-written file, and a restart goes on.

The suite kills a few processes. For more:

    KERAS_NRS_KILLS=100 python -m pytest -m slow -s tests/system/test_interrupts.py
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import cli
from keras_nrs.data import ImageData
from keras_nrs.experiments import recipes
from keras_nrs.flatness.landscape import Landscape
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.processes import FORKS

KILLS = int(os.environ.get("KERAS_NRS_KILLS", "20"))
RECIPE = "digits-wide_resnet_10_1-none-nrs"


def new_model() -> Any:
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, seed=3, compile=False)
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative", seed=0)
    nrs.optimizer.build(nrs.trainable_variables)
    return nrs


# What is killed: functions of a folder, and of what to call once they have begun.


def fit(folder: Path, begun: Callable[[], None]) -> None:
    """Keras's callbacks, and a file at the end."""
    x, y = image_data(32)
    nrs = new_model()
    begun()
    nrs.fit(
        x,
        y,
        batch_size=16,
        epochs=6,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.BackupAndRestore(folder / "backup"),
            keras.callbacks.ModelCheckpoint(folder / "last.keras"),
        ],
    )
    nrs.save(folder / "end.keras")


def monitored(folder: Path, begun: Callable[[], None]) -> None:
    """The same with measurements in between."""
    x, y = image_data(32)
    nrs = new_model()
    monitor = keras_nrs.callbacks.FlatnessMonitor(x, y, every=2)
    begun()
    nrs.fit(
        x,
        y,
        batch_size=16,
        epochs=8,
        shuffle=False,
        verbose=0,
        callbacks=[
            monitor,
            keras.callbacks.ModelCheckpoint(folder / "last.keras"),
            keras.callbacks.BackupAndRestore(
                folder / "backup", double_checkpoint=True, delete_checkpoint=False
            ),
        ],
    )
    nrs.save(folder / "end.keras")


def save(folder: Path, begun: Callable[[], None]) -> None:
    """A model and its weights, with one eps and with another, a hundred times."""
    nrs = new_model()
    begun()
    for i in range(100):
        nrs.eps = 0.25 if i % 2 else 0.5
        nrs.save(folder / "end.keras")
        nrs.save_weights(folder / "end.weights.h5")


def run_command(*arguments: Any) -> None:
    def small(shape: tuple[int, ...], classes: int) -> keras.Model:
        stack = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dropout(0.3)]
        return keras.Sequential([*stack, keras.layers.Dense(classes)])

    recipes.NETWORKS["small"] = small
    settings = ["network=small", "steps_per_epoch=4", "flatness=False"]
    options = [part for setting in settings for part in ("--set", setting)]
    invoke(*arguments, *options)


def invoke(*arguments: Any) -> None:
    assert not cli.build_app()([*map(str, arguments)], standalone_mode=False)


def train(folder: Path, begun: Callable[[], None]) -> None:
    """`keras-nrs train`: two trainings of four epochs."""
    begun()
    more = ["--set", "seeds=0,1", "--set", "epochs=4"]
    data = folder.parent / "data"
    run_command("train", RECIPE, "--output", folder, "--data-dir", data, *more)


def sweep(folder: Path, begun: Callable[[], None]) -> None:
    """`keras-nrs sweep`: four trials of two epochs."""
    begun()
    more = ["--set", "seeds=0", "--set", "epochs=2", "--vary", "eps=0.1,0.2,0.3,0.4"]
    data = folder.parent / "data"
    run_command("sweep", RECIPE, "--output", folder, "--data-dir", data, *more)


def report(folder: Path, begun: Callable[[], None]) -> None:
    """`keras-nrs report`, again and again."""
    begun()
    for _ in range(3):
        invoke("report", folder.parent / "runs", "--output", folder)


def flatness(folder: Path, begun: Callable[[], None]) -> None:
    """`keras-nrs flatness` of a small model."""
    begun()
    paths = [folder.parent / name for name in ("model.keras", "data.npz")]
    more = ["--points", 4, "--k", 2, "--batch-size", 16]
    invoke("flatness", paths[0], "--data", paths[1], "--output", folder, *more)


def demo(folder: Path, begun: Callable[[], None]) -> None:
    """`keras-nrs demo`: ten runs."""
    begun()
    more = ["--data", "digits", "--seeds", 2, "--epochs", 2, "--train-images", 50]
    invoke("demo", "--output", folder, *more)


# What must be true of a folder at any moment, and what is compared at the end.


def check_files(folder: Path) -> None:
    """Files that have their name can be read to their end."""
    for path in folder.rglob("*"):
        if path.name.startswith(".unfinished") or path.is_dir():
            continue
        if path.suffix == ".keras":
            keras.saving.load_model(path)
        elif path.suffix == ".h5":
            with h5py.File(path) as file:
                file.visititems(lambda _, item: hasattr(item, "shape") and item[()])
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix in (".csv", ".md", ".html"):
            assert path.read_text("utf-8").endswith("\n"), path


def weights_at_the_end(folder: Path) -> Any:
    paths = sorted(folder.glob("*.keras"))
    loaded = [keras.saving.load_model(path) for path in paths]
    return numpy_values(
        [v for nrs in loaded for v in nrs.variables + nrs.optimizer.variables]
    )


def trained_weights(folder: Path) -> Any:
    paths = sorted(folder.rglob("model.keras"))
    return [w for path in paths for w in keras.saving.load_model(path).get_weights()]


def trials(folder: Path) -> Any:
    lines = (folder / RECIPE / "trials.csv").read_text().splitlines()
    columns = lines[0].split(",")
    kept = [i for i, name in enumerate(columns) if "seconds" not in name]
    rows = [[line.split(",")[i] for i in kept] for line in lines]
    return [np.array(row) for row in rows]


def measurements(folder: Path) -> Any:
    (measured,) = folder.glob("measured-*")
    content = json.loads((measured / "measurements.json").read_text())
    products = sorted(measured.glob("*.products"))
    return [
        Landscape.load(measured / "landscape.npz").losses,
        np.hstack([content[name] for name in ("eigenvalues", "trace", "divergence")]),
        *(np.frombuffer(path.read_bytes(), np.uint8) for path in products),
    ]


def demo_runs(folder: Path) -> Any:
    rows = json.loads((folder / "runs.json").read_text())["runs"]
    return [np.array(list(row.values())) for row in rows]


def pages(folder: Path) -> Any:
    return [
        np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(folder.iterdir())
        if path.suffix in (".md", ".csv") and not path.name.startswith(".")
    ]


RESULTS: dict[Callable[..., None], Callable[[Path], Any]] = {
    fit: weights_at_the_end,
    monitored: weights_at_the_end,
    save: weights_at_the_end,
    train: trained_weights,
    sweep: trials,
    report: pages,
    flatness: measurements,
    demo: demo_runs,
}


def start(run: Callable[..., None], folder: Path) -> Any:
    """A process, once it has begun."""
    folder.mkdir(exist_ok=True)
    begun = FORKS.Event()
    # A daemon does not outlive a test that fails.
    process = FORKS.Process(target=run_quietly, args=(run, folder, begun), daemon=True)
    process.start()
    assert begun.wait(120), (folder.parent / "output.log").read_text()[-4000:]
    return process


def run_quietly(run: Callable[..., None], folder: Path, begun: Any) -> None:
    with (folder.parent / "output.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run(folder, begun.set)


def prepare(run: Callable[..., None], tmp_path: Path) -> None:
    if run in (train, sweep):
        # Where both processes look for it.
        data = ImageData(name="digits", data_dir=str(tmp_path / "data"))
        assert data.num_train
    if run is flatness:
        x, y = image_data(32)
        np.savez(tmp_path / "data.npz", x=x, y=y)
        new_model().save(tmp_path / "model.keras")
    if run is report:
        settings = recipes.recipes()
        for scheme in ("baseline", "nrs"):
            name = f"digits-wide_resnet_10_1-none-{scheme}"
            for seed in range(3):
                folder = tmp_path / "runs" / name / f"seed-{seed}"
                folder.mkdir(parents=True)
                recipe = dataclasses.asdict(settings[name])
                (folder / "recipe.json").write_text(json.dumps(recipe))
                found = {"seed": seed, "test_accuracy": 0.9 + seed / 100}
                found |= {"test_cross_entropy": 0.3, "seconds_per_step": 0.1}
                (folder / "summary.json").write_text(json.dumps(found))
                (folder / "history.csv").write_text("epoch,val_accuracy\n0,0.5\n")


def kill_many_times(run: Callable[..., None], tmp_path: Path, kills: int) -> int:
    """Kill a process, and its restarts, at random moments. Returns what survived."""
    prepare(run, tmp_path)
    whole = start(run, tmp_path / "whole")
    began = time.monotonic()
    whole.join(600)
    duration = time.monotonic() - began
    log = tmp_path / "output.log"
    assert whole.exitcode == 0, log.read_text()[-4000:]
    expected = RESULTS[run](tmp_path / "whole")
    rng = np.random.default_rng(0)
    killed, folder = 0, tmp_path / "killed"
    while killed < kills:
        process = start(run, folder)
        process.join(rng.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode == 0:
            check_result(run, folder, expected)
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -9, log.read_text()[-4000:]
        killed += 1
        check_files(folder)
    process = start(run, folder)
    process.join(600)
    assert process.exitcode == 0, log.read_text()[-4000:]
    check_result(run, folder, expected)
    print(
        f"{keras.config.backend()}, {run.__name__}: {killed} kills in {duration:.2f} s"
    )
    return killed


def check_result(run: Callable[..., None], folder: Path, expected: Any) -> None:
    check_files(folder)
    for pattern in (".unfinished*", ".*lock"):
        assert not list(folder.rglob(pattern))
    assert_equal(RESULTS[run](folder), expected)


@pytest.mark.only_torch  # Whose processes begin soonest.
@pytest.mark.parametrize(
    "run",
    [
        fit,
        *(pytest.param(r, marks=pytest.mark.slow) for r in (monitored, save, flatness)),
    ],
    ids=lambda r: r.__name__,
)
def test_kills(run: Callable[..., None], tmp_path: Path) -> None:
    kill_many_times(run, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("run", RESULTS, ids=lambda run: run.__name__)
def test_many_kills(run: Callable[..., None], tmp_path: Path) -> None:
    kill_many_times(run, tmp_path, KILLS)
