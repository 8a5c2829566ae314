"""Results of a suite that are written at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

SUITE = """
import os, pytest

def test_passes(): pass

def test_fails(): assert 1 == 2

@pytest.mark.skip(reason="no use")
def test_is_skipped(): pass

def test_is_killed(): os._exit(1)
"""


@pytest.mark.parametrize("options", [[], ["-n", "1", "--max-worker-restart=0"]])
def test_what_is_finished_is_kept(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    record = tmp_path / "record.jsonl"
    root = str(Path(__file__).parents[2])
    plugin = ["-p", "studies.suite_record", "--record", str(record)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *plugin, *options),
            *("--continue-on-collection-errors", "-p", "no:cacheprovider"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    found = {line["test"].split("::")[-1]: line for line in lines}
    outcomes = {name: line["outcome"] for name, line in found.items()}
    expected = {
        "test_broken.py": "package missing",
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
    }
    assert outcomes | expected == outcomes
    assert "assert 1 == 2" in found["test_fails"]["why"]
    assert "no_such_module" in found["test_broken.py"]["why"]
