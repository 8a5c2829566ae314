"""The report of made-up runs, and its command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs._locks import locked
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.report import to_csv
from keras_nrs.experiments.report import to_text
from keras_nrs.experiments.report import write_report
from keras_nrs.experiments.report_tables import Table
from keras_nrs.experiments.results import read_runs
from tests.experiments.runs import write_run

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


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_on_a_terminal_cuts_no_cell(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    headings = [f"cifar{i}, basic" for i in range(6)]
    row = {"network": "resnet18", "training": "baseline, twice the loss"}
    row |= dict.fromkeys(headings, "95.09 ± 1.19 [95.5]")
    text = to_text(Table("table1", "Table 1", pd.DataFrame([row])))
    assert text.count("95.09 ± 1.19 [95.5]") == 6
    assert all(heading in text for heading in headings)
    assert max(map(len, text.splitlines())) <= width


def report(folder: Path, output: Path) -> str:
    """What `keras-nrs report` prints."""
    arguments = ["report", str(folder), "--output", str(output)]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert result.exception is None
    return str(result.output)


def first_run(folder: Path) -> Path:
    return sorted(folder.rglob("summary.json"))[0].parent


def changed(name: str, **values: Any) -> Callable[[Path], Path]:
    """Values of a JSON file of the first run are replaced."""

    def change(folder: Path) -> Path:
        path = first_run(folder) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return path.parent

    return change


def written(name: str, data: bytes) -> Callable[[Path], Path]:
    """A file of the first run, or beside the runs, has other content."""

    def write(folder: Path) -> Path:
        path = folder / name if name.endswith("runs.csv") else first_run(folder) / name
        path.write_bytes(data)
        return path

    return write


def without(key: str) -> Callable[[Path], Path]:
    """The first run's recipe and summary lack a value."""

    def change(folder: Path) -> Path:
        for name in ("recipe.json", "summary.json"):
            path = first_run(folder) / name
            values = json.loads(path.read_text())
            values.pop(key, None)
            path.write_text(json.dumps(values))
        return path.parent

    return change


def missing(name: str) -> Callable[[Path], Path]:
    def remove(folder: Path) -> Path:
        path = first_run(folder) / name
        path.unlink()
        return path

    return remove


def a_folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = first_run(folder) / name
        path.unlink()
        path.mkdir()
        return path

    return make


HEADER = b"dataset,network,augmentation,arm,seed,test_accuracy\n"
DAMAGE = {
    "empty history": (written("history.csv", b""), "No columns"),
    "other history": (written("history.csv", b"a,b\n1,2\n"), "epoch"),
    "history of texts": (written("history.csv", b"epoch,val_accuracy\n0,x\n"), "'x'"),
    "binary history": (written("history.csv", b"\xff\xfe\x00"), ""),
    "folder for a history": (a_folder("history.csv"), ""),
    "unknown scheme": (changed("recipe.json", scheme="best"), "`scheme` must be"),
    "null scheme": (changed("recipe.json", scheme=None), "`scheme` must be"),
    "null network": (changed("recipe.json", network=None), "`network` must be"),
    "number for a dataset": (changed("recipe.json", dataset=3), "`dataset` must be"),
    "no dataset": (without("dataset"), "lacks 'dataset'"),
    "recipe cut off": (written("recipe.json", b'{"scheme": "n'), "damaged"),
    "recipe of a list": (written("recipe.json", b"[]"), "damaged"),
    "no recipe": (missing("recipe.json"), "No such file"),
    "summary of null": (written("summary.json", b"null"), "damaged"),
    "empty summary": (written("summary.json", b""), "damaged"),
    "deep summary": (written("summary.json", b"[" * 99_999), "damaged"),
    "folder for a summary": (a_folder("summary.json"), ""),
    "no seed": (without("seed"), "lacks 'seed'"),
    "text for a seed": (changed("summary.json", seed="one"), "`seed` must be"),
    "seed of a half": (changed("summary.json", seed=0.5), "`seed` must be"),
    "negative seed": (changed("summary.json", seed=-1), "`seed` must be"),
    "text": (changed("summary.json", test_accuracy="0.9"), "must be a number"),
    "null": (changed("summary.json", test_accuracy=None), "must be a number"),
    "true": (changed("summary.json", test_accuracy=True), "must be a number"),
    "list": (changed("summary.json", test_accuracy=[0.9]), "must be a number"),
    "percent": (changed("summary.json", test_accuracy=93.0), "not a percentage"),
    "NaN": (changed("summary.json", test_accuracy=float("nan")), "a share"),
    "text for a time": (changed("summary.json", seconds_per_step="1 s"), "a number"),
    "list for a loss": (changed("summary.json", test_cross_entropy=[]), "a number"),
    "latin-1": (written("runs.csv", HEADER + b"d,n,a,M\xfcller,0,0.9\n"), "UTF-8"),
    "text in a file": (written("runs.csv", HEADER + b"d,n,a,m,0,good\n"), "a number"),
    "no seed in a file": (written("runs.csv", HEADER + b"d,n,a,m,,0.9\n"), "'seed'"),
    "no network in a file": (
        written("runs.csv", HEADER + b"d,,a,m,1,0.9\n"),
        "network",
    ),
    "percent in a file": (
        written("runs.csv", HEADER + b"d,n,a,m,1,93\n"),
        "percentage",
    ),
    "more cells": (written("runs.csv", HEADER + b"d,n,a,m,0,0.9\n" + b"1," * 9), ""),
    "null bytes": (written("runs.csv", HEADER + b"\x00,\x00,a,m,x,0.9\n"), "seed"),
}


def test_a_run_that_cannot_be_read_is_a_line(folder: Path, tmp_path: Path) -> None:
    """The other runs are reported."""
    recipe, places = recipes()["cifar10-wide_resnet_28_10-basic-baseline"], {}
    for seed, (name, (damage, _)) in enumerate(DAMAGE.items(), start=3):
        write_run(folder / name / "run", recipe, seed, test_accuracy=0.9)
        places[name] = str(damage(folder / name))
    output = report(folder, tmp_path / "report")
    lines = output.partition("Left out, and why:")[2].strip().splitlines()
    pages = [(tmp_path / "report" / f"report.{s}").read_text() for s in ("md", "html")]
    assert all("Left out, and why" in page for page in pages)
    for name, (_, reason) in DAMAGE.items():
        # A row of its own may have been damaged besides.
        place = places[name]
        assert any(place in line and reason in line for line in lines), (name, output)
        assert all(place in page for page in pages), name
    assert "[96.94 ± 0.17]" in output
    assert "Traceback" not in output


def test_a_report_leaves_its_own_files_out(folder: Path, tmp_path: Path) -> None:
    outputs = [report(folder, folder / "report") for _ in range(2)]
    assert outputs[0] == outputs[1]
    # Also those of another report.
    other = report(folder, tmp_path / "other")
    assert other.replace(str(tmp_path / "other"), "") == outputs[0].replace(
        str(folder / "report"), ""
    )
    arguments = ["report", str(folder / "report" / "runs.csv")]
    result = CliRunner().invoke(
        cli.build_app(), [*arguments, "--output", str(folder / "report")]
    )
    assert result.exit_code == 2
    assert "would replace" in result.output


def test_texts_of_others_break_no_table(tmp_path: Path) -> None:
    cells = '"=1+1","a|b\\|c\n\x1b[2Jd",none,"<b>, @x",0,0.9\n'
    (tmp_path / "mine.csv").write_text(HEADER.decode() + cells)
    output = report(tmp_path / "mine.csv", tmp_path / "report")
    table = output.split("\n\n")[1]
    assert [line.count(" | ") for line in table.splitlines()] == [2, 2, 2]
    assert r"a\|b\\\|c [2Jd" in table
    assert "\x1b" not in output
    assert "<b>" not in (tmp_path / "report" / "report.html").read_text()
    again = pd.read_csv(tmp_path / "report" / "runs.csv")
    assert again["dataset"].tolist() == ["'=1+1"]
    assert again["seed"].tolist() == [0]


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(A1)", "-0.5 ± 0.1"])
def test_formulas_are_quoted_and_numbers_are_not(text: str) -> None:
    cells = pd.DataFrame({text: [text, "-0.5", "+1e9", "x=1", ""], "b": [-1.0] * 5})
    lines = to_csv(cells).splitlines()
    assert lines[:2] == [f"'{text},b", f"'{text},-1.0"]
    assert lines[2:] == ["-0.5,-1.0", "+1e9,-1.0", "x=1,-1.0", ",-1.0"]


def test_a_report_has_one_writer(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    with locked(output):
        arguments = ["report", str(folder), "--output", str(output)]
        result = CliRunner().invoke(cli.build_app(), arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: The folder {str(output)!r} is in use")
        assert [path.name for path in output.iterdir()] == [".lock"]
