"""Across modules: the type checker sees through the training step."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# Types are the same on each backend.
pytestmark = pytest.mark.only_torch

PACKAGE = ROOT / "keras_nrs"
MISSPELLED = {
    "trainers/jax.py": ["options.memory_efficient"],
    "trainers/jax_passes.py": ["perturbed_outputs"],
    "trainers/tensorflow.py": ["options.memory_efficient", "perturbed_outputs"],
    "trainers/torch.py": ["options.memory_efficient", "perturbed_outputs"],
    "step/model_passes.py": ["options.perturbed_fraction"],
}


def misspell(path: Path, attribute: str) -> int:
    """Misspell the first access to an attribute; returns the number of its line."""
    text = path.read_text("utf-8")
    found = re.search(rf"(?<=\.){re.escape(attribute)}\b", text)
    assert found, f"{path.name} must use .{attribute}, which this test misspells."
    path.write_text(f"{text[: found.end()]}_{text[found.end() :]}", "utf-8")
    return text.count("\n", 0, found.end()) + 1


def test_misspelled_attributes_of_the_step_are_errors(tmp_path: Path) -> None:
    copy = tmp_path / "keras_nrs"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    expected = {
        f"keras_nrs/{file}:{misspell(copy / file, attribute)}: error: "
        f'"{kind}" has no attribute "{attribute.split(".")[-1]}_"'
        for file, attributes in MISSPELLED.items()
        for attribute in attributes
        for kind in ["StepOptions" if "options." in attribute else "BatchObjective"]
    }
    result = subprocess.run(
        [
            *[sys.executable, "-m", "mypy", "--no-incremental"],
            *[str(Path("keras_nrs") / file) for file in MISSPELLED],
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stdout.count(": error: ") == len(expected), result.stdout
    for error in expected:
        assert error in result.stdout, result.stdout + result.stderr


def test_no_self_is_of_any_type() -> None:
    texts = {p.name: p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "self: Any" in text] == []


# A user's program, and what a checker says of its lines.
PROGRAM = """
import keras
import keras_nrs
from keras_nrs import flatness

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
nrs = keras_nrs.wrap(model, 0.2, alpha=keras.optimizers.schedules.CosineDecay(1.0, 9))
nrs.eps = 0.3
flatness.hessian_eigenvalues(nrs, [], k=2, variables="all")
keras_nrs.wrap(model, schem="rpr")  # Unexpected keyword argument "schem"
keras_nrs.wrap(model, eps="0.2")  # Argument "eps" to "wrap" has incompatible type "str"
keras_nrs.wrap(model, interval=1.5)  # Argument "interval" to "wrap" has incompatible
keras_nrs.wrap(model, 0.2, 1.0, 2.0)  # Too many positional arguments for "wrap"
flatness.hessian_eigenvalues(nrs, [], k="two")  # Argument "k" to "hessian_eigenvalues"
flatness.hessian_trace(nrs, [], batchsize=9)  # Unexpected keyword argument "batchsize"
keras_nrs.calibrate_eps(nrs, [])  # Missing named argument "target_divergence"
keras_nrs.callbacks.FlatnessMonitor([], every="5")  # Argument "every" to
keras_nrs.perturbations.RelativeBall(radius=1)  # Argument "radius" to "RelativeBall"
"""


def test_a_checker_sees_wrong_arguments_in_a_program_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", tmp_path / "program.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = {
        int(number): message
        for number, message in re.findall(
            r"program\.py:(\d+): error: (.*)", result.stdout
        )
    }
    comments = {
        i: line.partition("  # ")[2]
        for i, line in enumerate(PROGRAM.splitlines(), start=1)
        if "  # " in line
    }
    assert errors.keys() == comments.keys(), result.stdout
    for number, comment in comments.items():
        assert errors[number].startswith(comment)


def test_the_package_says_that_it_is_typed() -> None:
    # The wheel has all files of the folder.
    assert (PACKAGE / "py.typed").exists()
