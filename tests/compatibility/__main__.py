"""Writes `docs/compatibility.md`: `python -m tests.compatibility` (some 10 minutes).

Each backend is tried in a process of its own.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

# Four virtual devices, as in the suite.
import conftest
from keras_nrs._files import write_text
from tests.compatibility import table
from tests.compatibility.table import Found
from tests.support.processes import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ["keras", "jax", "tensorflow", "torch", "keras-hub", "keras-cv"]
PACKAGES += ["keras-tuner"]


def try_all() -> dict[str, Found]:
    """What is found for each row on this process's backend."""
    found = {}
    for name, check in table.CHECKS.items():
        found[name] = table.examine(check)
        print(f"{conftest.BACKEND}: {name}: {found[name]}", flush=True)
    return found


def try_backend(backend: str) -> dict[str, Found]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        subprocess.run(
            [sys.executable, "-m", "tests.compatibility", path],
            env=os.environ | {"KERAS_BACKEND": backend},
            check=True,
        )
        found = json.loads(path.read_text("utf-8"))
    return {name: Found(*values) for name, values in found.items()}


def versions() -> str:
    packages = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, {', '.join(packages)}, on a CPU."


def main() -> None:
    if len(sys.argv) > 1:
        write_text(sys.argv[1], json.dumps(try_all()))
    else:
        found = {backend: try_backend(backend) for backend in table.BACKENDS}
        write_text(PAGE, table.markdown(found, versions()))


if __name__ == "__main__":
    main()
