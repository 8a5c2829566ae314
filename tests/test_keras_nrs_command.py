"""The entry point beside the package."""

import subprocess
import sys
import tomllib

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


def test_the_command_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["scripts"] == {"keras-nrs": "keras_nrs_command:main"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "keras_nrs_command.py" in wheel["only-include"]
