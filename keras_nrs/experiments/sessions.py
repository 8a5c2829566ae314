"""The sessions of a training, each a process that trained some of its epochs."""

import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import keras

from keras_nrs._files import read_json
from keras_nrs._files import write_text

try:
    import resource
except ModuleNotFoundError:  # Windows.
    resource = None  # type: ignore[assignment]

_PACKAGES = ("keras-nrs", "keras", "jax", "tensorflow", "torch", "tensorflow-datasets")


def add_session(folder: Path) -> None:
    """Add this process to `environment.json`: its time, command and packages."""
    path, sessions = folder / "environment.json", []
    if path.exists():
        sessions = read_json(path, _expect_list, remedy="Delete it.")
    text = json.dumps([*sessions, _environment()], indent=1) + "\n"
    write_text(path, text)


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes.

    `None` on Windows, where Python does not know it.
    """
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _expect_list(content: Any) -> None:
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}, not a list")


def _environment() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": keras.config.backend(),
        "packages": versions,
    }
