"""Across modules: training in several processes on this machine."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np
import pytest

from tests.support.arrays import ROUNDING
from tests.support.processes import NUMBERS
from tests.support.processes import ROOT
from tests.support.processes import free_ports
from tests.support.replicas import devices

# Arguments: a JSON object with the index of a process, the port, ...
JAX = """
import json, os, sys, time
args = json.loads(sys.argv[1])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
import keras
if args.get("heartbeat"):
    jax.distributed.initialize(
        f"127.0.0.1:{args['ports'][0]}", args["number"], args["index"],
        heartbeat_timeout_seconds=args["heartbeat"])
else:
    keras.distribution.initialize(
        f"127.0.0.1:{args['ports'][0]}", args["number"], args["index"])
import tensorflow as tf
keras.distribution.set_distribution(keras.distribution.DataParallel())
"""
TENSORFLOW = """
import json, os, sys, time
args = json.loads(sys.argv[1])
os.environ["TF_CONFIG"] = json.dumps({
    "cluster": {"worker": [f"127.0.0.1:{port}" for port in args["ports"]]},
    "task": {"type": "worker", "index": args["index"]}})
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
scope = strategy.scope()
scope.__enter__()
import keras
"""
TRAIN = """
import keras_nrs
from tests.support.data import image_data
from tests.support.networks import cnn
keras.utils.set_random_seed(7)
x, y = image_data(args.get("samples", 64))
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16, drop_remainder=True)
model = cnn(dropout=0.5)
nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative")

class Waiting(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        print("epoch", epoch, flush=True)

    def on_train_batch_begin(self, batch, logs=None):
        if self.model._initial_epoch is None and args.get("pause"):
            time.sleep(args["pause"])

callbacks = [Waiting()]
if "backup" in args:
    callbacks.insert(0, keras.callbacks.BackupAndRestore(
        args["backup"], delete_checkpoint=False))
history = nrs.fit(
    data, epochs=args["epochs"], verbose=0, shuffle=False, callbacks=callbacks).history
found = {"history": history, "evaluate": nrs.evaluate(data, verbose=0),
         "weights": [w.tolist() for w in model.get_weights()]}
nrs.save(args["file"])
# One process stops within an epoch, and all end with it.
stop = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: setattr(nrs, "stop_training", batch == 1))
found["stopped"] = nrs.fit(
    data, epochs=3, verbose=0, shuffle=False,
    callbacks=[] if args.get("index") else [stop]).epoch
print("FOUND", json.dumps(found), flush=True)
"""


def start(script: str, output: Path, **args: Any) -> Any:
    """One of several processes, which share four devices on JAX; it has one on TF."""
    backend = "jax" if script is JAX else "tensorflow"
    # Of two flags the last one counts.
    number = 4 // args["number"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
    environment = os.environ | {"KERAS_BACKEND": backend, "XLA_FLAGS": flags}
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", script + TRAIN, json.dumps(args)],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def found(process: Any, output: Path) -> dict[str, Any]:
    """What a run printed at its end."""
    code = process.wait(timeout=240)
    text = output.read_text()
    assert code == 0, text[-4000:]
    line = next(line for line in text.splitlines() if line.startswith("FOUND"))
    result: dict[str, Any] = json.loads(line.removeprefix("FOUND"))
    return result


def run(script: str, tmp_path: Path, number: int, **args: Any) -> list[Any]:
    started = start_all(script, tmp_path, number, name="whole", **args)
    return [found(process, output) for process, output in zip(*started, strict=True)]


def start_all(
    script: str, tmp_path: Path, number: int, *, name: str, **args: Any
) -> tuple[list[Any], list[Path]]:
    """Several processes, and where they print."""
    outputs = [tmp_path / f"{name}-{index}.log" for index in range(number)]
    common = {"number": number, "ports": free_ports(number), "epochs": 4}
    common |= {"file": str(tmp_path / f"{name}.keras")} | args
    processes = [
        start(script, output, **(common | {"index": index}))
        for index, output in enumerate(outputs)
    ]
    return processes, outputs


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
    import tensorflow as tf

    with TemporaryDirectory() as folder, devices(num_devices):
        args = {"epochs": 4, "file": f"{folder}/alone.keras"}
        names = {"args": args, "keras": keras, "json": json, "tf": tf, "time": time}
        exec(TRAIN, names)
    found: dict[str, Any] = names["found"]
    return found


@pytest.mark.matrix
@pytest.mark.only_jax
@pytest.mark.parametrize("number", NUMBERS)
def test_processes_are_one_with_the_same_devices(tmp_path: Path, number: int) -> None:
    first, *others = run(JAX, tmp_path, number)
    assert others == [first] * (number - 1)
    assert_same_run(first, alone(4))
    assert first["stopped"] == [0]
    assert (tmp_path / "whole.keras").exists()
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.matrix
@pytest.mark.only_tensorflow
@pytest.mark.parametrize("number", NUMBERS)
def test_workers_are_one_with_the_same_devices(tmp_path: Path, number: int) -> None:
    for worker in run(TENSORFLOW, tmp_path, number):
        assert_same_run(worker, alone(number))
        assert worker["stopped"] == [0]
    assert (tmp_path / "whole.keras").exists()


def wait_for(output: Path, text: str) -> None:
    limit = time.monotonic() + 120
    while text not in output.read_text():
        assert time.monotonic() < limit, output.read_text()[-4000:]
        time.sleep(0.1)


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
    tmp_path: Path, number: int, victim: int
) -> None:
    args = {"heartbeat": 10, "backup": str(tmp_path / "backup")}
    processes, outputs = start_all(
        JAX, tmp_path, number, name="killed", pause=0.3, **args
    )
    # In the middle of the third epoch, with two of them saved.
    wait_for(outputs[0], "epoch 2")
    processes[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    codes = [process.wait(timeout=60) for process in processes]
    print(f"ended {time.monotonic() - killed_at:.0f} s after one was killed")
    assert codes[victim] == -signal.SIGKILL
    assert 0 not in codes
    assert not any("FOUND" in output.read_text() for output in outputs)

    first, *others = run(JAX, tmp_path, number, **args)
    texts = [path.read_text() for path in tmp_path.glob("whole-*.log")]
    assert all("epoch 2" in text and "epoch 1" not in text for text in texts)
    for other in others:
        assert first["weights"] == other["weights"]
        assert_same_run(first, other)
    whole = alone(4)
    history = {name: values[2:] for name, values in whole["history"].items()}
    assert_same_run(first, whole | {"history": history})
    assert (tmp_path / "whole.keras").exists()
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.only_jax
@pytest.mark.slow
def test_processes_with_other_numbers_of_batches_do_not_wait(tmp_path: Path) -> None:
    """Each would wait for a batch of the other one for ever."""
    file = str(tmp_path / "model.keras")
    common = {"number": 2, "ports": free_ports(2), "epochs": 2, "file": file}
    outputs = [tmp_path / f"{index}.log" for index in range(2)]
    processes = [
        start(JAX, output, index=index, samples=64 - 16 * index, **common)
        for index, output in enumerate(outputs)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert 0 not in codes
    for output in outputs:
        text = output.read_text()
        assert "must have the same number of batches" in text, text[-2000:]
        assert "[(4.0, 0.0), (3.0, 0.0)]" in text or "[(4, 0), (3, 0)]" in text
        assert "epoch 0" not in text
    assert not Path(file).exists()


@pytest.mark.only_tensorflow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_dead_worker_ends_the_others(tmp_path: Path, number: int) -> None:
    processes, outputs = start_all(
        TENSORFLOW, tmp_path, number, name="killed", pause=0.3, epochs=20
    )
    wait_for(outputs[0], "epoch 1")
    processes[-1].send_signal(signal.SIGKILL)
    codes = [process.wait(timeout=60) for process in processes]
    assert 0 not in codes
