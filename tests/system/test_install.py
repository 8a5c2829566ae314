"""Across files: what installing does to an environment that has a backend already."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from notebooks import execute
from tests.support.processes import ROOT

# What Google Colab had in February 2026. Its GPU needs this JAX and this TensorFlow.
COLAB = {
    "jax": "0.7.2",
    "tensorflow": "2.19.0",
    "torch": "2.10.0",
    "numpy": "2.0.2",
    "tensorboard": "2.19.0",
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

pytestmark = pytest.mark.only_torch  # Nothing here depends on the backend.


def requirements(extras: set[str]) -> list[Requirement]:
    """What the core and some extras ask for, with the extras that these name."""
    found = [Requirement(text) for text in EXTRAS["dependencies"]]
    for extra in extras:
        for text in EXTRAS["optional-dependencies"][extra]:
            requirement = Requirement(text)
            is_own = requirement.name == "keras-nrs"
            found += requirements(requirement.extras) if is_own else [requirement]
    return found


@pytest.mark.parametrize("path", execute.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_replaces_no_backend_of_colab(path: Path) -> None:
    (extras,) = re.findall(
        r"keras-nrs\[([a-z,]+)\]", execute.read(path).cells[1].source
    )
    assert not {"jax", "tensorflow", "torch"} & set(extras.split(","))
    for requirement in requirements(set(extras.split(","))):
        if requirement.name in COLAB:
            assert Version(COLAB[requirement.name]) in requirement.specifier


def test_each_extra_of_a_backend_takes_colabs() -> None:
    for backend in ("jax", "tensorflow", "torch"):
        for requirement in requirements({backend}):
            version = COLAB.get(requirement.name)
            assert version is None or Version(version) in requirement.specifier
