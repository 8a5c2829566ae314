"""Across modules: the guide's script for several GPUs on PyTorch, on two CPU cores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.support.processes import ROOT
from tests.system.test_several_processes import free_port

pytestmark = pytest.mark.only_torch

# What is compared: the state at the end, and the last delta of each process.
PRINT = """
found = {"weights": [w.tolist() for w in model.get_weights()],
         "delta": deltas[0].tolist()}
print("FOUND", json.dumps(found))
distributed.destroy_process_group()
"""


def script() -> str:
    """The script of the page, which prints what it found at its end."""
    page = (ROOT / "docs/devices.md").read_text("utf-8")
    (text,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert text.endswith("distributed.destroy_process_group()\n")
    return "import json\n" + text.removesuffix("distributed.destroy_process_group()\n")


@pytest.mark.slow
def test_two_processes_have_a_delta_each_and_the_same_weights(tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script() + PRINT],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    found, logs = [], []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        *lines, last = output.splitlines()
        logs.append(lines)
        found.append(json.loads(last.removeprefix("FOUND ")))
    first, second = found
    assert first["weights"] == second["weights"]
    assert not np.allclose(first["delta"], second["delta"])
    losses = [float(line.partition(": ")[2]) for line in logs[0]]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert logs[1] == []
    saved = keras.saving.load_model(tmp_path / "model.keras").get_weights()
    for weight, expected in zip(saved, first["weights"], strict=True):
        np.testing.assert_array_equal(weight, np.array(expected, weight.dtype))
