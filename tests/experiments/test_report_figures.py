"""Figures of made-up runs."""

from pathlib import Path

import pytest

from keras_nrs.experiments.report_figures import draw
from keras_nrs.experiments.results import read_runs

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_figures_are_drawn_of_what_the_runs_have(folder: Path, tmp_path: Path) -> None:
    runs = read_runs([folder])
    assert draw(runs, tmp_path / "all") == ["curves.png", "differences.png"]
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    for history in folder.rglob("history.csv"):
        history.unlink()
    assert draw(runs, tmp_path / "no curves") == ["differences.png"]
    only_nrs = runs[runs["arm"] == "NRS"]
    assert draw(only_nrs, tmp_path / "nothing") == []
