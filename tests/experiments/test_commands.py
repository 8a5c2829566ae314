"""Commands at once in a folder, on full disks, and after Ctrl-C.

Each command runs in a process of its own, which has a network that compiles fast.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import pytest

from tests.experiments.processes import Script
from tests.support.asserts import assert_equal

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

RECIPE = "digits-wide_resnet_10_1-none-nrs"
SCRIPT = """
import os, resource, signal, sys, threading, time, keras
import tensorboard.summary.v2, typer  # What a command loads late, once for all.
from keras import layers
from keras_nrs import cli
from keras_nrs.experiments import demo, recipes, sweep, training
from keras_nrs.flatness import report

def small(shape, classes):
    stack = [keras.Input(shape), layers.Flatten(), layers.Dropout(0.3)]
    return keras.Sequential([*stack, layers.Dense(classes)])

recipes.NETWORKS["small"] = small

def interrupt_soon(self, epoch, logs=None, save=training._SaveEpoch.on_epoch_end):
    save(self, epoch, logs)
    if is_interrupted:
        os.kill(os.getpid(), signal.SIGINT)

training._SaveEpoch.on_epoch_end = interrupt_soon

def main(limit, *arguments):
    global is_interrupted
    is_interrupted = limit == "interrupt"
    # A shell's background jobs ignore Ctrl-C, and so do their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit.isdecimal():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.argv[1:] = arguments
    cli.main()
"""
SETTINGS = ("network=small", "steps_per_epoch=2", "flatness=False", "seeds=0")
SETTINGS += ("batch_size=250",)  # Few batches to evaluate.


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    with Script(SCRIPT, tmp_path_factory.mktemp("outputs")) as script:
        yield script


def command(name: str, folder: Path, data_dir: str, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return [
        name,
        RECIPE,
        *settings,
        "--output",
        str(folder),
        "--data-dir",
        data_dir,
        *more,
    ]


def sessions(folder: Path) -> list[int]:
    """The number of processes that trained in each folder of a training."""
    paths = sorted(folder.rglob("environment.json"))
    return [len(json.loads(path.read_text())) for path in paths]


def check_codes(results: list[tuple[int, str]], *, refused: int) -> None:
    """Commands are finished or refused, in a line that names the other one."""
    for code, output in results:
        assert "Traceback" not in output
        assert code in (0, refused), output
        assert code == 0 or "is in use by process" in output, output
    assert 0 in [code for code, _ in results]


@pytest.mark.slow
def test_demos_with_other_settings(tmp_path: Path, script: Script) -> None:
    """Both exited with 0, and the runs of one were gone."""
    runs = []
    for images in ("20", "25"):
        arguments = [
            "demo",
            "--data",
            "digits",
            "--seeds",
            "2",
            "--epochs",
            "1",
            "--train-images",
            images,
        ]
        runs.append((("none", *arguments, "--output", str(tmp_path)), {}))
    results = script.run_together(*runs)
    check_codes(results, refused=1)
    files = [json.loads(path.read_text()) for path in tmp_path.glob("runs*.json")]
    found = {file["settings"]["train_images"]: len(file["runs"]) for file in files}
    finished = {
        int(images)
        for images, (code, _) in zip((20, 25), results, strict=True)
        if code == 0
    }
    assert found == dict.fromkeys(finished, 10)
    # What was refused can be done afterwards, and loses nothing.
    refused = [run for run, (code, _) in zip(runs, results, strict=True) if code]
    for arguments, environment in refused:
        ((code, output),) = script.run_together((arguments, environment))
        assert code == 0, output
    files = [json.loads(path.read_text()) for path in tmp_path.glob("runs*.json")]
    assert {file["settings"]["train_images"] for file in files} == {20, 25}


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_the_same_command_at_once(
    tmp_path: Path, data_dir: str, script: Script, name: str
) -> None:
    """All was trained twice."""
    vary = ["--vary", "eps=0.1,0.2"] if name == "sweep" else []
    arguments = command(name, tmp_path, data_dir, *vary)
    run: tuple[Any, dict[str, str]] = (("none", *arguments, "--set", "epochs=2"), {})
    results = script.run_together(run, run, run)
    check_codes(results, refused=1)
    assert sessions(tmp_path) == [1] * (2 if name == "sweep" else 1)
    assert not list(tmp_path.rglob(".lock"))
    code, output = script.run(*run[0])
    assert code == 0, output
    assert sessions(tmp_path) == [1] * (2 if name == "sweep" else 1)


# Bytes that a file can have, which stand for a full disk: less than a checkpoint has.
@pytest.mark.parametrize(
    "limit",
    [4000, *(pytest.param(n, marks=pytest.mark.slow) for n in (2000, 9000, 20_000))],
)
def test_a_full_disk_is_a_line_and_nothing_is_lost(
    tmp_path: Path, data_dir: str, script: Script, limit: int
) -> None:
    def train(name: str, limit: str, *more: str) -> tuple[int, str]:
        return script.run(limit, *command("train", tmp_path / name, data_dir, *more))

    epochs = ["--set", "epochs=2"]
    code, output = train("full", str(limit), *epochs)
    assert code == 1, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("Error: "), output
    code, output = train("full", "none", *epochs)
    assert code == 0, output
    assert train("whole", "none", *epochs)[0] == 0
    assert_equal(*(weights(tmp_path / name) for name in ("full", "whole")))


def weights(folder: Path) -> Any:
    (path,) = folder.rglob("model.keras")
    return keras.saving.load_model(path).get_weights()


def test_ctrl_c(tmp_path: Path, data_dir: str, script: Script) -> None:
    arguments = command("train", tmp_path, data_dir, "--set", "epochs=2")
    for _ in range(2):
        code, output = script.run("interrupt", *arguments)
        assert code == 130, output
        assert output.splitlines()[-1] == "Stopped. The same command goes on from here."
        assert "Traceback" not in output
    code, output = script.run("none", *arguments)
    assert code == 0, output
    assert sessions(tmp_path) == [3]
