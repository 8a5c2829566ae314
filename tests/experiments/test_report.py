"""The report of made-up runs, and its command."""

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs.experiments.report import write_report
from keras_nrs.experiments.results import read_runs

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_a_file_of_runs_is_read_and_written(folder: Path, tmp_path: Path) -> None:
    runs = read_runs([folder])
    write_report(runs, tmp_path / "report")
    again = read_runs([tmp_path / "report" / "runs.csv"])
    names = ["dataset", "network", "arm", "seed", "test_accuracy"]
    pd.testing.assert_frame_equal(
        runs[names], again[names], check_dtype=False, check_column_type=False
    )


def test_figures_are_drawn_of_what_the_runs_have(folder: Path, tmp_path: Path) -> None:
    runs = read_runs([folder])
    assert drawn(runs, tmp_path / "all") == ["curves.png", "differences.png"]
    for history in folder.rglob("history.csv"):
        history.unlink()
    assert drawn(runs, tmp_path / "no curves") == ["differences.png"]
    assert drawn(runs[runs["arm"] == "NRS"], tmp_path / "nothing") == []


def drawn(runs: pd.DataFrame, folder: Path) -> list[str]:
    """The names of the figures in a report of runs."""
    write_report(runs, folder)
    figures = sorted(folder.glob("*.png"))
    for path in figures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"![{path.name}]({path.name})" in (folder / "report.md").read_text()
    return [path.name for path in figures]


def test_the_command(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    arguments = ["report", str(folder), "--output", str(output)]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert "[96.94 ± 0.17]" in result.output
    assert {path.name for path in output.iterdir()} == {
        *("report.md", "report.html", "runs.csv", "curves.png", "differences.png"),
        *("table1.csv", "table2.csv", "table3.csv"),
        *("differences.csv", "measures.csv", "costs.csv"),
    }
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "96.94 ± 0.17" in (output / "report.html").read_text()
    table_1 = pd.read_csv(output / "table1.csv")
    assert list(table_1) == ["network", "training", "cifar10, basic"]
