"""The entry point beside the package."""

import os
import subprocess
import sys
import tomllib

import pytest

import keras_nrs_command
from tests.support.processes import ROOT

VERSION = "import sys, keras_nrs_command; sys.argv[1:] = ['--version']; "
VERSION += "keras_nrs_command.main()"


def test_the_command_writes_nothing_but_its_answer() -> None:
    result = subprocess.run(
        [sys.executable, "-c", VERSION],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("keras-nrs ")
    assert result.stderr == ""


LATE = """
import sys, keras_nrs_command
sys.argv[1:] = ["--version"]
try:
    keras_nrs_command.main()
except SystemExit:
    import tensorflow
    print(tensorflow.constant(1).numpy())
"""


@pytest.mark.only_torch
def test_a_late_import_of_tensorflow_is_quiet_too() -> None:
    """Keras imports it on other backends, as soon as it serializes something."""
    result = subprocess.run(
        [sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n1\n")
    assert result.stderr == ""


@pytest.mark.matrix
def test_the_command_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["scripts"] == {"keras-nrs": "keras_nrs_command:main"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "keras_nrs_command.py" in wheel["only-include"]


@pytest.mark.only_torch
def test_only_logs_below_errors_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    kept = ["E0000 00:00:1.5 2 a.cc:1] an error\n", "Traceback\n", "I think so\n"]
    left_out = [
        "WARNING: All log messages before absl::InitializeLog() is called are\n",
        "I0000 00:00:1795761912.241424    9649 port.cc:153] oneDNN\n",
        "W0104 10:00:00.1   9649 port.cc:153] a warning\n",
        "2026-01-01 10:00:00.1: I tensorflow/core/a.cc:1] oneDNN\n",
        "To enable the following instructions: AVX2\n",
    ]
    with keras_nrs_command.without_logs():
        for line in (*left_out, *kept):
            os.write(2, line.encode())
    assert capfd.readouterr().err == "".join(kept)
    with pytest.raises(KeyError), keras_nrs_command.without_logs():
        print("a line", file=sys.stderr)
        raise KeyError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a line\nafter\n"


@pytest.mark.only_torch
def test_standard_error_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with keras_nrs_command.without_logs():
        pass
