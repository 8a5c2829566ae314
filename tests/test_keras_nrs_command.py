"""The entry point beside the package."""

import os
import subprocess
import sys
import tomllib

import keras
import pytest

import keras_nrs_command
from tests.support.processes import ROOT

PUT_OFF = """
import keras_nrs_command, sys
sys.argv[1:] = ["--version"]
try:
    keras_nrs_command.main()
except SystemExit:
    pass
import keras_nrs.experiments.recipes
assert "keras" not in sys.modules
keras_nrs_command.load_package()
keras_nrs_command.load_package()
import keras, keras_nrs
assert set(keras_nrs.__all__) <= set(dir(keras_nrs))
assert keras_nrs.experiments.recipes
print(keras.saving.get_registered_object("keras_nrs>NRSModel").__name__)
if keras.config.backend() == "torch":
    # On other backends Keras imports it late, as soon as it serializes something.
    import tensorflow
    print(tensorflow.constant(1).numpy())
"""


def test_the_package_is_imported_whole_and_without_logs() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PUT_OFF],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    version, *lines = result.stdout.splitlines()
    assert version.startswith("keras-nrs ")
    assert lines == ["NRSModel", *(["1"] if keras.config.backend() == "torch" else [])]
    assert result.stderr == ""


WITHOUT_KERAS = """
import sys
sys.modules["keras"] = None
import keras_nrs_command
for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    try:
        keras_nrs_command.main()
    except SystemExit:
        print(file=sys.stderr)
"""
RECIPE = "digits-wide_resnet_10_1-none-nrs"
ANSWERS = {
    "--version": "keras-nrs ",
    "sweep --help": "--vary",
    "train list digits": RECIPE,
    f"train {RECIPE} --dry-run": "Dry run",
    f"train {RECIPE} --no": "No such option",
    "train digits": "No recipe has the name",
    f"train {RECIPE} --set no=1": "Received: 'no=1'",
    f"sweep {RECIPE} --set eps=-1": "`eps` must be finite",
    f"train {RECIPE} --set scheme=sam": "whose own is 'ascent'",
}


@pytest.mark.only_torch
def test_arguments_are_answered_without_keras() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, *ANSWERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for answer in ANSWERS.values():
        assert answer in result.stdout + result.stderr


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
