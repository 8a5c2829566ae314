"""Across modules: training in several processes on this machine."""

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from tests.experiments.processes import Script
from tests.support.arrays import ROUNDING
from tests.support.processes import NUMBERS
from tests.support.processes import free_ports
from tests.support.replicas import BACKEND
from tests.support.replicas import devices

TRAIN = """
import json, os, signal, sys, keras, keras_nrs
import tensorflow as tf
from tests.support.data import image_data
from tests.support.networks import cnn

class Reporting(keras.callbacks.Callback):
    # Says which epochs are trained. The victim kills itself in the middle of one.
    def __init__(self, kill_in):
        super().__init__()
        self.kill_in = kill_in

    def on_epoch_begin(self, epoch, logs=None):
        print("epoch", epoch, flush=True)
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == (self.kill_in, 2):
            os.kill(os.getpid(), signal.SIGKILL)

def train(args):
    keras.utils.set_random_seed(7)
    x, y = image_data(args.get("samples", 64))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16, drop_remainder=True)
    model = cnn(dropout=0.5)
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    is_victim = "victim" in args and args["victim"] == args["index"]
    callbacks = [Reporting(args["kill_in"] if is_victim else None)]
    if "backup" in args:
        callbacks.insert(0, keras.callbacks.BackupAndRestore(
            args["backup"], delete_checkpoint=False))
    history = nrs.fit(data, epochs=args["epochs"], verbose=0, shuffle=False,
                      callbacks=callbacks).history
    found = {"history": history, "evaluate": nrs.evaluate(data, verbose=0),
             "weights": [w.tolist() for w in model.get_weights()]}
    nrs.save(args["file"])
    # One process stops within an epoch, and all end with it.
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(
            nrs, "stop_training", batch == 1))
    found["stopped"] = nrs.fit(
        data, epochs=3, verbose=0, shuffle=False,
        callbacks=[] if args.get("index") else [stop]).epoch
    return found
"""
# Arguments: a JSON object with the index of a process, the ports, ...
PROCESS = """
def joined(args):  # A scope in which models train on all devices.
    if keras.config.backend() == "tensorflow":
        os.environ["TF_CONFIG"] = json.dumps({
            "cluster": {"worker": [f"127.0.0.1:{port}" for port in args["ports"]]},
            "task": {"type": "worker", "index": args["index"]}})
        return tf.distribute.MultiWorkerMirroredStrategy().scope()
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{args['ports'][0]}", args["number"], args["index"]
    if args.get("heartbeat"):
        jax.distributed.initialize(
            *address, heartbeat_timeout_seconds=args["heartbeat"])
    else:
        keras.distribution.initialize(*address)
    return keras.distribution.DataParallel().scope()

def main(text):
    signal.alarm(240)  # None waits for ever.
    args = json.loads(text)
    with joined(args):
        print("FOUND", json.dumps(train(args)), flush=True)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    folder = tmp_path_factory.mktemp("outputs")
    with Script(TRAIN + PROCESS, folder) as script:
        yield script


def start(script: Script, number: int, *own: Any, **args: Any) -> list[tuple[int, str]]:
    """Exit codes and outputs of processes, which share four devices on JAX.

    Args:
        script: The script.
        number: The number of processes.
        own: For each process arguments of its own, if there are any.
        args: Arguments of all.
    """
    # Of two flags the last one counts.
    flag = f"--xla_force_host_platform_device_count={4 // number}"
    environment = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
    common = {"number": number, "ports": free_ports(number), "epochs": 4} | args
    runs = [
        ((json.dumps(common | {"index": index} | more),), environment)
        for index, more in enumerate(own or [{}] * number)
    ]
    return script.run_together(*runs)


def found(results: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """What processes printed at their end."""
    lines = []
    for code, text in results:
        assert code == 0, text[-4000:]
        lines += [line for line in text.splitlines() if line.startswith("FOUND")]
    return [json.loads(line.removeprefix("FOUND")) for line in lines]


def assert_same_run(first: dict[str, Any], second: dict[str, Any]) -> None:
    # 16 steps, each of which sums fewer than 1,000 numbers of order one and passes on
    # the errors of the last one, doubled at the most every 2 steps.
    bound = 256 * 1000 * ROUNDING
    for a, b in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
    for name, values in first["history"].items():
        np.testing.assert_allclose(values, second["history"][name], rtol=bound)
    np.testing.assert_allclose(first["evaluate"], second["evaluate"], rtol=bound)


@functools.cache
def alone(num_devices: int) -> dict[str, Any]:
    """One process, this one, with the devices of several."""
    names: dict[str, Any] = {}
    exec(TRAIN, names)
    with TemporaryDirectory() as folder, devices(num_devices):
        found: dict[str, Any] = names["train"](
            {"epochs": 4, "file": f"{folder}/alone.keras"}
        )
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.not_torch
def test_processes_are_one_with_the_same_devices(
    tmp_path: Path, script: Script, number: int
) -> None:
    file = tmp_path / "whole.keras"
    first, *others = found(start(script, number, file=str(file)))
    expected = alone(4 if BACKEND == "jax" else number)
    for process in (first, *others):
        assert_same_run(process, expected)
        assert process["stopped"] == [0]
    if BACKEND == "jax":
        assert others == [first] * (number - 1)
    assert file.exists()
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.only_jax
@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (2, 0),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_a_dead_process_ends_the_others_and_a_restart_goes_on(
    tmp_path: Path, script: Script, number: int, victim: int
) -> None:
    file = tmp_path / "whole.keras"
    args = {"heartbeat": 10, "backup": str(tmp_path / "backup"), "file": str(file)}
    # With two epochs saved.
    results = start(script, number, victim=victim, kill_in=2, **args)
    codes = [code for code, _ in results]
    assert codes[victim] == -signal.SIGKILL
    assert not {0, -signal.SIGALRM} & set(codes)
    assert not any("FOUND" in text for _, text in results)

    results = start(script, number, **args)
    assert all("epoch 2" in text and "epoch 1" not in text for _, text in results)
    first, *others = found(results)
    for other in others:
        assert first["weights"] == other["weights"]
        assert_same_run(first, other)
    whole = alone(4)
    history = {name: values[2:] for name, values in whole["history"].items()}
    assert_same_run(first, whole | {"history": history})
    assert file.exists()
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.only_jax
@pytest.mark.slow
def test_processes_with_other_numbers_of_batches_do_not_wait(
    tmp_path: Path, script: Script
) -> None:
    """Each would wait for a batch of the other one for ever."""
    file = tmp_path / "model.keras"
    own = [{"samples": 64 - 16 * index} for index in range(2)]
    for code, text in start(script, 2, *own, epochs=2, file=str(file)):
        assert code not in (0, -signal.SIGALRM)
        assert "must have the same number of batches" in text, text[-2000:]
        assert "[(4.0, 0.0), (3.0, 0.0)]" in text or "[(4, 0), (3, 0)]" in text
        assert "epoch 0" not in text
    assert not file.exists()


@pytest.mark.only_tensorflow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_dead_worker_ends_the_others(
    tmp_path: Path, script: Script, number: int
) -> None:
    args = {"victim": number - 1, "kill_in": 1, "file": str(tmp_path / "a.keras")}
    codes = [code for code, _ in start(script, number, **args)]
    assert codes[-1] == -signal.SIGKILL
    assert not {0, -signal.SIGALRM} & set(codes)
