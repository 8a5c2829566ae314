"""Runs that are read from folders and files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs._schemes import SCHEMES
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_values
from keras_nrs.experiments.results import read_runs
from tests.experiments.runs import write_run

STUDY = Path(__file__).parents[2] / "docs" / "study" / "runs"

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_trials_of_sweeps_are_left_out(folder: Path) -> None:
    recipe = recipes()["cifar10-vgg16-basic-nrs"]
    write_run(folder / "trial", recipe, 0, validation_accuracy=0.9)
    assert "vgg16" not in set(read_runs([folder])["network"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "must hold finished runs"),
        (lambda folder: folder.write_text("a,b\n1,2\n"), "must have the columns"),
    ],
)
def test_bad_paths(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "runs")
    arguments = ["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_run_must_not_be_there_twice(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must not hold a run twice.*seed=0"):
        read_runs([folder, folder])


def test_runs_of_version_0_1_0_are_those_of_the_papers_text(
    tmp_path: Path,
) -> None:
    recipe = recipes()["cifar10-vgg16-basic-nrs"]
    for seed, source in enumerate(("paper", "released", "paper")):
        path = tmp_path / str(seed)
        write_run(path, replace(recipe, source=source), seed, test_accuracy=0.9)
    # Version 0.1.0 wrote no source.
    values = json.loads((tmp_path / "2" / "recipe.json").read_text())
    del values["source"]
    (tmp_path / "2" / "recipe.json").write_text(json.dumps(values))
    arms = read_runs([tmp_path]).sort_values("seed")["arm"]
    assert arms.tolist() == [
        f"NRS, source={source}" for source in ("paper", "released", "paper")
    ]


def test_trainings_without_a_result_are_named(folder: Path) -> None:
    recipe = recipes()["cifar10-resnet18-basic-nrs"]
    for name, others in (("diverged", {}), ("trial", {"test": False})):
        write_run(folder / name, recipe, 7)
        (folder / name / "summary.json").unlink()
        values = json.loads((folder / name / "recipe.json").read_text())
        text = json.dumps(values | others, indent=1)
        (folder / name / "recipe.json").write_text(text)
    left_out: list[str] = []
    assert 7 not in set(read_runs([folder], left_out)["seed"])
    (line,) = left_out
    assert line.startswith(f"{folder / 'diverged'}: it has not finished")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_of_each_scheme_are_read(scheme: str, tmp_path: Path) -> None:
    ascents = {"sam": "ascent", "asam": "adaptive_ascent"}
    recipe = with_values(
        recipes()["cifar10-vgg16-basic-nrs"],
        {"scheme": scheme, "perturbation": ascents.get(scheme, "released")},
    )
    for eps in (0.05, 0.1):
        run = replace(recipe, eps=eps)
        write_run(tmp_path / f"{scheme}-{eps}", run, int(100 * eps), test_accuracy=0.9)
    label = "baseline" if scheme == "baseline" else scheme.upper()
    varied = ("", "") if scheme == "baseline" else (", eps=0.05", ", eps=0.1")
    assert sorted(read_runs([tmp_path])["arm"]) == [f"{label}{v}" for v in varied]


def test_the_files_of_the_study_are_read() -> None:
    runs = read_runs([STUDY])
    # 10 seeds of 10 arms on 12 tasks, and of 2 rules on 4 of them.
    assert len(runs) == 10 * (10 * 12 + 2 * 4)
    assert runs["test_accuracy"].between(0, 1).all()
