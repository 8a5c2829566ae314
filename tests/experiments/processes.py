"""Processes that can be killed, after a single start of Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.processes import ROOT

# Imports take most of a short command's time: each run is a fork of one process.
_FORKS = """
import json, os, sys, traceback

def in_fork(run):
    file = os.open(run["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(run["environment"])
    try:
        code = main(*run["arguments"]) or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    children = []
    for run in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            in_fork(run)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    print(json.dumps(list(map(os.waitstatus_to_exitcode, statuses))), flush=True)
"""


# For scripts that train a small network with BatchNorm and dropout, for 2 epochs of 4
# steps, and may kill themselves in the second.
SMALL_TRAINING = """
import os, keras
from pathlib import Path
from keras import layers
from keras_nrs.experiments import recipes, training

dropout_seed = None

def small(shape, classes):
    stack = [keras.Input(shape), layers.Conv2D(4, 3), layers.BatchNormalization(),
             layers.ReLU(), layers.Flatten(), layers.Dropout(0.3, seed=dropout_seed)]
    return keras.Sequential([*stack, layers.Dense(classes)])

def on_train_batch_end(self, batch, logs=None):
    if len(self._history) == 1 and batch == 2:
        os.kill(os.getpid(), 9)

recipes.NETWORKS["small"] = small

def train(folder, data_dir, mode, **changes):
    if mode == "kill":
        training._SaveEpoch.on_train_batch_end = on_train_batch_end
    recipe = recipes.Recipe(
        network="small", dataset="digits", augmentation="basic", batch_size=100,
        epochs=2, steps_per_epoch=4, perturbation="relative", eps=0.3,
        learning_rate=0.05, **changes)
    training.Training(recipe, 0, Path(folder), data_dir).run()
"""


class Script:
    """A script whose function `main` runs in processes of its own.

    Args:
        text: The script, which imports what it needs and defines `main`. Backends must
            not compute anything before `main`: their threads do not survive a fork.
        folder: Folder of the processes' outputs.
    """

    def __init__(self, text: str, folder: Path) -> None:
        self._folder, self._num_runs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", text + _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # One device is enough, and sooner compiled for.
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
            cwd=ROOT,
        )

    def __enter__(self) -> "Script":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def run(self, *arguments: str) -> tuple[int, str]:
        """The exit code and the output of `main(*arguments)`; -9 after SIGKILL."""
        (result,) = self.run_together((arguments, {}))
        return result

    def run_together(self, *runs: tuple[Any, dict[str, str]]) -> list[tuple[int, str]]:
        """Exit codes and outputs of runs at the same time.

        Args:
            runs: For each, the arguments of `main` and more environment variables.
        """
        requests = []
        for arguments, environment in runs:
            self._num_runs += 1
            requests.append(
                {
                    "arguments": list(arguments),
                    "environment": environment,
                    "output": str(self._folder / f"output-{self._num_runs}"),
                }
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(requests), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, self._process.communicate()
        outputs = [Path(request["output"]).read_text() for request in requests]
        return list(zip(json.loads(answer), outputs, strict=True))
