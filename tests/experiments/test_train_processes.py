"""Trainings of recipes by several processes, on this machine."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from keras_nrs import cli
from tests.experiments.processes import SMALL_TRAINING
from tests.experiments.processes import Script
from tests.support.arrays import ROUNDING
from tests.support.processes import NUMBERS
from tests.support.processes import free_ports

SCRIPT = (
    SMALL_TRAINING
    + """
from keras_nrs.backend import join_processes

dropout_seed = 1

def main(folder, data_dir, mode, number, num_devices):
    if keras.config.backend() == "tensorflow" and number == 1:
        import tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * num_devices)
    if number > 1:
        join_processes()
    if keras.config.backend() == "torch" and number == 1:
        # A process has one device there, which takes as many groups.
        own = recipes.Recipe.step_arguments
        groups = {"perturbations_per_replica": num_devices}
        recipes.Recipe.step_arguments = lambda self: own(self) | groups
    train(folder, data_dir, mode, validation_percent=10)
"""
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    with Script(SCRIPT, tmp_path_factory.mktemp("outputs")) as script:
        yield script


def environments(number: int, num_devices: int) -> list[dict[str, str]]:
    """What launchers set for each process, which shares devices with the others."""
    ports = list(map(str, free_ports(number)))
    workers = [f"127.0.0.1:{port}" for port in ports]
    return [
        {
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={num_devices // number}",
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": ",".join(workers),
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(number),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            ),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": ports[0],
            "WORLD_SIZE": str(number),
            "RANK": str(index),
            "LOCAL_RANK": str(index),
        }
        for index in range(number)
    ]


def train(
    script: Script,
    folder: Path,
    data_dir: str,
    *modes: str,
    num_devices: int | None = None,
) -> list[tuple[int, str]]:
    """Exit codes and outputs of a process for each mode, with a device or more."""
    number = len(modes)
    num_devices = num_devices or number
    runs = [
        ((str(folder), data_dir, mode, number, num_devices), environment)
        for mode, environment in zip(
            modes, environments(number, num_devices), strict=True
        )
    ]
    return script.run_together(*runs)


def outcome(folder: Path) -> tuple[list[Any], str]:
    """The weights of a training, and its history without the seconds."""
    model = keras.saving.load_model(folder / "model.keras")
    history = (folder / "history.csv").read_text().splitlines()
    kept = [",".join(row.split(",")[:1] + row.split(",")[2:]) for row in history]
    return model.get_weights(), "\n".join(kept)


# The gate compiles no programs of other processes on JAX and TensorFlow.
@pytest.mark.matrix
@pytest.mark.parametrize("number", NUMBERS)
def test_several_processes_train_as_one_and_go_on_after_a_kill(
    tmp_path: Path, data_dir: str, script: Script, number: int
) -> None:
    run = ["run"] * number
    kill = [*run[1:], "kill"]
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    results = train(script, whole, data_dir, *run)
    assert [code for code, _ in results] == [0] * number, results
    # The first process alone prints and writes.
    assert "Epoch 2/2" in results[0][1]
    assert not any("Epoch" in output for _, output in results[1:])
    assert len(json.loads((whole / "environment.json").read_text())) == 1

    *others, victim = train(script, killed, data_dir, *kill)
    assert victim[0] == -signal.SIGKILL
    assert not {0, -signal.SIGKILL} & {code for code, _ in others}, others
    assert not (killed / "summary.json").exists()
    results = train(script, killed, data_dir, *run)
    assert [code for code, _ in results] == [0] * number, results
    assert "Epoch 1/2" not in results[0][1]
    weights, history = outcome(whole)
    for a, b in zip(weights, outcome(killed)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert history == outcome(killed)[1]

    ((code, output),) = train(script, alone, data_dir, "run", num_devices=number)
    assert code == 0, output
    # 8 steps, each of which sums fewer than 1,000 numbers of order one and passes on
    # the errors of the last one, doubled at the most every 2 steps.
    bound = 16 * 1000 * ROUNDING
    for a, b in zip(weights, outcome(alone)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
    of_all, of_one = (
        np.genfromtxt(text.splitlines(), delimiter=",", names=True)
        for text in (history, outcome(alone)[1])
    )
    assert of_all.dtype == of_one.dtype
    for name in of_all.dtype.names:
        np.testing.assert_allclose(of_all[name], of_one[name], rtol=bound)


NEEDED = {"jax": "SLURM", "tensorflow": "TF_CONFIG", "torch": "torchrun"}


@pytest.mark.only_jax  # It would not join after the tests before this one.
def test_without_other_processes_there_is_an_error(
    tmp_path: Path, data_dir: str, script: Script
) -> None:
    (result,) = script.run_together(((str(tmp_path), data_dir, "run", 2, 2), {}))
    assert result[0] == 1
    assert NEEDED["jax"] in result[1].splitlines()[-1]


@pytest.mark.not_jax
def test_without_other_processes_the_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, in_tmp_path: None
) -> None:
    for name in ("TF_CONFIG", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["train", "cifar10-resnet18-basic-nrs", "--distributed"]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 2
    assert NEEDED[keras.config.backend()] in result.output
    assert not os.path.exists("runs")
