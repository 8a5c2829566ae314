"""Keras's own tests of layers, models and training pass with wrapped models.

Each folder of Keras's tests, which its wheel holds, runs twice: plain, and with every
model wrapped before it is trained. A test must pass in both runs or in neither, unless
`differences.py` says why. `pytest -s` shows how many tests and models that were.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import keras
import pytest

from tests.keras_suite.differences import DIFFERENCES
from tests.support.processes import ROOT

KERAS = Path(keras.__file__).parent / "src"
FOLDERS = ("callbacks", "layers", "models", "optimizers", "saving", "trainers")
# For the tests of a folder, in seconds.
TIMEOUT = 2 * 3600
# One device, and programs that compile fast.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def run_tests(folder: str, record: Path, *options: str) -> dict[str, Any]:
    """What the plugin records of each test in a folder, by the test's name."""
    plugins = ["-p", "tests.keras_suite.plugin", "-p", "no:cacheprovider"]
    settings = ["-c", os.devnull, "--rootdir", str(KERAS), "-q", "-W", "ignore"]
    # Some modules need packages that are not installed.
    settings += ["--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *plugins, *settings, *options]
    output = subprocess.run(
        [*command, "--record", str(record), str(KERAS / folder)],
        env=os.environ | {"XLA_FLAGS": XLA_FLAGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    ).stdout
    # The last line; a run that was killed has none.
    assert " passed" in output[-200:], output[-2000:]
    lines = map(json.loads, record.read_text("utf-8").splitlines())
    return {line["test"]: line for line in lines}


def passed(records: dict[str, Any]) -> set[str]:
    return {test for test, line in records.items() if line["outcome"] == "passed"}


def explanations(folder: str) -> dict[str, str]:
    """The reason for each pattern of tests of a folder that may differ here."""
    backends = ("all", keras.config.backend())
    return {
        pattern: reason
        for reason, patterns in DIFFERENCES.items()
        for backend in backends
        for pattern in patterns.get(backend, ())
        if pattern.startswith(folder)
    }


def summary(plain: dict[str, Any], wrapped: dict[str, Any]) -> str:
    trainings: Counter[str] = Counter()
    for line in wrapped.values():
        trainings.update(line["trainings"])
    training_tests = {test for test, line in wrapped.items() if line["trainings"]}
    outcomes = Counter(line["outcome"] for line in plain.values())
    return (
        f"plain {dict(outcomes)}, {len(passed(wrapped))} passed wrapped; "
        f"{len(training_tests)} tests train, of which "
        f"{len(training_tests & passed(plain))} passed plain and "
        f"{len(training_tests & passed(wrapped))} wrapped; "
        f"trainings {dict(trainings)}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_passed_plain_and_wrapped(folder: str, tmp_path: Path) -> None:
    plain = run_tests(folder, tmp_path / "plain")
    wrapped = run_tests(folder, tmp_path / "wrapped", "--wrap")
    print(f"\n{folder}: {summary(plain, wrapped)}")
    differing = passed(plain) ^ passed(wrapped)
    unexplained = dict.fromkeys(differing)
    for pattern, reason in explanations(folder).items():
        found = {test for test in differing if fnmatch(test, pattern)}
        print(f"  {len(found)} differ, {pattern}: {reason}")
        assert found, f"{pattern} explains no difference"
        for test in found:
            unexplained.pop(test, None)
    for test in unexplained:
        unexplained[test] = (wrapped.get(test) or plain[test])["error"]
    assert not unexplained
    assert any(line["trainings"].get("wrapped") for line in wrapped.values())
