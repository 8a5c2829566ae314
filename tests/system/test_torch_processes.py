"""Across modules: several processes on PyTorch, on CPU cores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.support.arrays import ROUNDING
from tests.support.networks import cnn
from tests.support.processes import NUMBERS
from tests.support.processes import ROOT
from tests.support.processes import free_ports
from tests.support.processes import hide_tensorflow
from tests.support.training_in_processes import OPTIONS
from tests.support.training_in_processes import train
from tests.support.training_in_processes import validation_data

pytestmark = pytest.mark.only_torch

END = "distributed.destroy_process_group()\n"
PRINT = 'print("FOUND", json.dumps([w.tolist() for w in model.get_weights()]))\n'


def run_together(folder: Path, number: int, *arguments: str) -> list[list[str]]:
    """The lines that Python prints in each of the processes of a group."""
    hide_tensorflow(folder)
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(*free_ports(1)), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in map(str, range(number))
    ]
    lines = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        lines.append(output.splitlines())
    return lines


def script() -> str:
    """The script of the page, which prints its weights at its end."""
    page = (ROOT / "docs/devices.md").read_text("utf-8")
    (text,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert text.endswith(END)
    return "import json\n" + text.removesuffix(END) + PRINT + END


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_the_script_of_the_guide(tmp_path: Path, number: int) -> None:
    first, *others = run_together(tmp_path, number, "-c", script())
    assert others == [first[-1:]] * (number - 1)
    losses = [float(x) for x in re.findall(r" loss: ([\d.]+)", "\n".join(first))]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    weights = json.loads(first[-1].removeprefix("FOUND "))
    saved = keras.saving.load_model(tmp_path / "train.keras").get_weights()
    for weight, expected in zip(saved, weights, strict=True):
        np.testing.assert_array_equal(weight, np.array(expected, weight.dtype))


def assert_validates_all(result: dict[str, Any], number: int) -> None:
    """The last validation is of the samples that each process has for it."""
    model = cnn(dropout=0.3, penalty=0.01)
    model.set_weights([np.array(weight, "float32") for weight in result["weights"]])
    shares = [validation_data(index, number) for index in range(number)]
    x, y = map(np.concatenate, zip(*shares, strict=True))
    loss, accuracy = model.evaluate(x, y, verbose=0)
    history = result["history"]
    np.testing.assert_allclose(history["val_loss"][-1], loss, rtol=100 * ROUNDING)
    np.testing.assert_allclose(history["val_accuracy"][-1], accuracy, rtol=ROUNDING)


@pytest.mark.parametrize("number", NUMBERS)
def test_fit_in_processes_is_fit_with_as_many_groups(
    tmp_path: Path, number: int
) -> None:
    module = "tests.support.training_in_processes"
    outputs = run_together(tmp_path, number, "-m", module)
    found = [json.loads(lines[-1].removeprefix("FOUND ")) for lines in outputs]
    results, stopped = zip(*found, strict=True)
    # All end with the one that a callback stops.
    assert stopped == ([2, 2, 2],) * number
    for (options, has_groups), one, *others in zip(OPTIONS, *results, strict=True):
        for other in others:
            assert one["weights"] == other["weights"], options
            assert one["history"] == other["history"], options
            # Outside of `fit()` each process evaluates its own samples.
            assert one["evaluate"] != other["evaluate"], options
        assert_validates_all(one, number)
        if not has_groups:
            continue
        alone = train(options | {"perturbations_per_replica": number}, 0, 1)
        # 8 steps of sums of fewer than 1,000 numbers, each of which may double errors.
        bound = 16 * 1000 * ROUNDING
        for a, b in zip(one["weights"], alone["weights"], strict=True):
            np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
        for name, values in alone["history"].items():
            if not name.startswith("val_"):
                np.testing.assert_allclose(one["history"][name], values, rtol=bound)
