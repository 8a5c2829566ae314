"""Python programs in processes of their own."""

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]
# Of a run, for tests: what holds for two may not hold for more.
NUMBERS = [2, pytest.param(4, marks=pytest.mark.slow)]
# Processes that are copies of one, which has imported everything: TensorFlow too, which
# Keras imports for a seed. Python has one such process, with the modules named last.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.system.test_interrupts", "tests.test_locks", "tensorflow"]
)


def run_python(script: str, *arguments: object, backend: str | None = None) -> str:
    """Output of a Python script that runs in a new process."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": backend or keras.config.backend()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def hide_tensorflow(folder: Path) -> None:
    """Let Python processes that begin in a folder not find TensorFlow.

    Other backends need it for little, but Keras imports it for a seed where it is
    installed, which takes seconds.
    """
    (folder / "tensorflow.py").write_text("raise ImportError")


def free_ports(number: int) -> list[int]:
    """Ports of this machine that no program uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
