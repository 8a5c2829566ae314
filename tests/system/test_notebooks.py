"""Across modules: the notebooks run, and are committed after a whole run."""

import ast
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks import execute
from tests.support.processes import ROOT
from tests.support.processes import hide_tensorflow

PAGE = "https://colab.research.google.com/github/keras-nrs/keras-nrs/blob/main"
SMALL: dict[str, dict[str, Any]] = {
    "1_first_steps": {
        "EPOCHS": 2,
        "POINTS": 2,
        "CALIBRATION_IMAGES": 10,
        "SEEDS": 2,
        "VALIDATION_SEEDS": 2,
        "COMPARISON_EPOCHS": 1,
    },
    "2_vision_transformers": {
        "IMAGES": 64,
        "SEEDS": 2,
        "EPOCHS": 1,
        "LAYERS": 1,
        "FINE_TUNING_SEEDS": 2,
        "FINE_TUNING_EPOCHS": 1,
    },
    "3_flatness": {
        "SEEDS": 2,
        "EPOCHS": 2,
        "MEASUREMENTS": 1,
        "PRODUCTS": 6,
        "LANCZOS_STEPS": 4,
        "POINTS": 3,
    },
    "4_many_devices": {"EPOCHS": 1},
    "5_table_1": {
        "SCHEMES": ("nrs",),
        "SETTINGS": ["seeds=0", "epochs=1", "steps_per_epoch=1", "flatness=False"],
    },
    "6_custom_loops": {"EPOCHS": 1},
    "7_rounded_weights": {
        "SEEDS": 2,
        "EPOCHS": 1,
        "TRAIN_IMAGES": 100,
        "TEST_IMAGES": 100,
    },
    "8_wrong_labels": {
        "SEEDS": 2,
        "EPOCHS": 1,
        "TRAIN_IMAGES": 100,
        "VALIDATION_IMAGES": 20,
        "TEST_IMAGES": 100,
    },
}

NEEDS_TENSORFLOW = ("2_vision_transformers", "5_table_1", "6_custom_loops")

# Each runs in a process of its own, on the backend that starts soonest.
pytestmark = pytest.mark.only_torch
each_notebook = pytest.mark.parametrize("path", execute.NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path: Path) -> list[Any]:
    return [c for c in execute.read(path).cells if c.cell_type == "code"]


def errors(cells: list[Any]) -> list[str]:
    """What was written to the standard error."""
    return [
        output.text
        for cell in cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]


@each_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It starts soonest. Two notebooks choose their backends themselves.
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    # One device, unless the notebook itself asks for more: programs compile faster.
    one_device = "--xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {one_device}")
    if path.stem not in NEEDS_TENSORFLOW:
        hide_tensorflow(tmp_path)
    notebook = execute.read(path)
    execute.run(notebook, folder=tmp_path, parameters=SMALL[path.stem])
    assert all("UserWarning: eps=" in text for text in errors(notebook.cells))


@each_notebook
def test_small_settings_are_settings(path: Path) -> None:
    notebook = execute.read(path)
    cell = notebook.cells[execute.parameters_cell(notebook)]
    names = {node.id for node in ast.walk(ast.parse(cell.source)) if _is_set(node)}
    assert set(SMALL[path.stem]) <= names


def _is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@each_notebook
def test_outputs_are_those_of_one_whole_run(path: Path) -> None:
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags == ["parameters"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    # The first one shows the warning of an eps without effect.
    assert len(errors(cells)) == (path.stem == "1_first_steps")


@each_notebook
def test_outputs_are_of_no_machine(path: Path) -> None:
    outputs = str([cell.outputs for cell in code_cells(path)])
    for part in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages"):
        # Somebody's home may be "/".
        assert part == "/" or part not in outputs
    metadata = [dict(cell.metadata) for cell in execute.read(path).cells]
    assert [m for m in metadata if m] == [{"tags": ["parameters"]}]


@each_notebook
def test_badges_lead_to_the_notebook(path: Path) -> None:
    link = f"{PAGE}/notebooks/{path.name}"
    assert f"({link})" in execute.read(path).cells[0].source
    assert f"({link})" in (path.parent / "README.md").read_text("utf-8")


@each_notebook
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    prefix = "https://github.com/keras-nrs/keras-nrs/blob/main/"
    for link in re.findall(rf"\({re.escape(prefix)}([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_a_notebook_that_fails_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = nbformat.v4.new_code_cell("1 / 0", id="a")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    path = tmp_path / "1_fails.ipynb"
    execute.write(notebook, path)
    before = path.read_bytes()
    monkeypatch.setattr(execute, "NOTEBOOKS", [path])
    monkeypatch.setattr("sys.argv", ["execute.py", "1"])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.main()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
