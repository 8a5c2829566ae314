"""Tables and figures of runs that the test makes up."""

import json
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs.experiments import published
from keras_nrs.experiments import report
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.results import read_runs

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch


def write_run(folder: Path, recipe: Recipe, seed: int, **summary: Any) -> None:
    """What `keras-nrs train` leaves, as far as reports read it."""
    folder.mkdir(parents=True)
    values = {"seed": seed, "seconds_per_step": 0.1, "peak_memory_mib": 800.0}
    text = json.dumps(asdict(recipe) | {"seed": seed})
    (folder / "recipe.json").write_text(text)
    (folder / "summary.json").write_text(json.dumps(values | summary))
    (folder / "history.csv").write_text("epoch,val_accuracy\n0,0.3\n1,0.5\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CIFAR-10 with all schemes, three seeds; ImageNet with NRS, one seed."""
    rng = np.random.default_rng(0)
    for scheme, seconds in (("baseline", 0.1), ("rpr", 0.15), ("nrs", 0.2)):
        name = f"cifar10-wide_resnet_28_10-basic-{scheme}"
        for seed in range(3):
            write_run(
                tmp_path / "runs" / name / f"seed-{seed}",
                recipes()[name],
                seed,
                test_accuracy=float(rng.uniform(0.9, 1)),
                test_cross_entropy=0.2,
                seconds_per_step=seconds,
                last_layer_eigenvalue=float(rng.uniform(1, 2)),
                last_layer_kfra_eigenvalue=2.0,
            )
    write_run(
        tmp_path / "runs" / "imagenet" / "seed-0",
        recipes()["imagenet2012-imagenet_resnet50-flip-nrs"],
        0,
        test_accuracy=0.76,
        test_top_5_accuracy=0.93,
        test_cross_entropy=1.0,
    )
    return tmp_path / "runs"


def table(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    (found,) = [t.cells for t in report.tables(runs) if t.name == name]
    return found


def test_published_numbers() -> None:
    # 7 networks x 4 columns x 3 schemes, and 3 networks x 2 schemes.
    assert len(published.ACCURACY) == 7 * 4 * 3 + 3 * 2
    for cell, text in {
        ("cifar10", "vgg16", "basic", "baseline"): "93.12 ± 0.08",
        ("cifar100", "pyramidnet_164_270", "cutout", "nrs"): "86.29 ± 0.18",
        ("cifar100", "vit_b", "heavy", "rpr"): "72.35 ± 0.17",
        ("cifar10", "vit_ti", "heavy", "nrs"): "90.47 ± 0.14",
        ("imagenet2012", "imagenet_vgg16", "flip", "nrs"): "73.52 ± 0.09",
    }.items():
        assert str(published.ACCURACY[cell]) == text
    assert published.ACCURACY.keys() < {
        (r.dataset, r.network, r.augmentation, r.scheme) for r in recipes().values()
    }
    key = "imagenet2012", "imagenet_resnet101", "flip", "baseline"
    assert str(published.TOP_5_ACCURACY[key]) == "93.91 ± 0.07"


def test_tables_1_to_3_have_the_published_number_beside_ours(folder: Path) -> None:
    runs = read_runs([folder])
    accuracy = 100 * runs[runs["arm"] == "NRS"].query("dataset == 'cifar10'")
    mean, spread = accuracy["test_accuracy"].mean(), accuracy["test_accuracy"].std()
    table_1 = table(runs, "table1").set_index(["network", "training"])
    assert list(table_1.index) == [
        ("WideResNet-28-10", arm) for arm in ("baseline", "RPR", "NRS")
    ]
    expected = f"{mean:.2f} ± {spread:.2f} [96.94 ± 0.17]"
    assert table_1.loc[("WideResNet-28-10", "NRS"), "cifar10, basic"] == expected
    (row,) = table(runs, "table2").to_dict("records")
    assert row["network"] == "ResNet50"
    assert row["top-1 accuracy"] == "76.00 [76.29 ± 0.13]"
    assert row["top-5 accuracy"] == "93.00 [93.53 ± 0.10]"
    table_3 = table(runs, "table3").set_index("training")
    assert table_3.loc["RPR", "last layer, KFRA"] == "2.00 ± 0.00 [51.79]"


def test_differences_are_those_of_a_paired_t_test(folder: Path) -> None:
    runs = read_runs([folder])
    found = report.paired_differences(runs, "test_accuracy").set_index("arm")
    cifar = runs[runs["dataset"] == "cifar10"]
    values = cifar.pivot(index="seed", columns="arm", values="test_accuracy")
    for arm in ("RPR", "NRS"):
        expected = ttest_rel(values[arm], values["baseline"])
        low, high = expected.confidence_interval()
        row = found.loc[arm]
        assert row["p"] == pytest.approx(expected.pvalue)
        assert row["mean"] - row["width"] == pytest.approx(low)
        assert row["mean"] + row["width"] == pytest.approx(high)
        assert row["higher"] + row["lower"] == row["n"] == 3
    ratio = report.paired_differences(runs, "last_layer_eigenvalue", log=True)
    eigenvalues = cifar.pivot(
        index="seed", columns="arm", values="last_layer_eigenvalue"
    )
    expected_mean = np.log(eigenvalues["NRS"] / eigenvalues["baseline"]).mean()
    assert ratio.set_index("arm").loc["NRS", "mean"] == pytest.approx(expected_mean)


def test_equal_runs_are_no_evidence(folder: Path) -> None:
    runs = read_runs([folder])
    runs["test_accuracy"] = 0.5
    found = report.paired_differences(runs, "test_accuracy")
    assert (found["p"] == 1).all()
    assert (found["width"] == 0).all()


def test_pairs_need_the_seed_in_both_arms(folder: Path) -> None:
    runs = read_runs([folder])
    without = runs[~((runs["arm"] == "baseline") & (runs["seed"] == 1))]
    found = report.paired_differences(without, "test_accuracy").set_index("arm")
    assert list(found["n"]) == [2, 2]


def test_adjusted_p_values() -> None:
    p = pd.Series([0.01, np.nan, 0.04, 0.03], index=[3, 4, 5, 6])
    # Benjamini and Hochberg: n p / rank, made monotone from the largest down.
    np.testing.assert_allclose(report.adjusted(p), [0.03, np.nan, 0.04, 0.04])


def test_the_mean_over_cells(folder: Path) -> None:
    runs = read_runs([folder])
    cifar = runs[runs["dataset"] == "cifar10"]
    both = pd.concat([cifar, cifar.assign(dataset="cifar100")], ignore_index=True)
    cells = table(both, "overall_test_accuracy").set_index("training")
    found = report.paired_differences(cifar, "test_accuracy").set_index("arm")
    mean, error = found.loc["NRS", ["mean", "error"]]
    # Two independent cells: the error of their mean is smaller by sqrt(2).
    width = 1.96 * error / 2**0.5
    assert (
        cells.loc["NRS", "mean difference"] == f"{100 * mean:+.2f} ± {100 * width:.2f}"
    )
    assert cells.loc["NRS", "cells"] == 2


def test_costs_are_in_baselines(folder: Path) -> None:
    costs = table(read_runs([folder]), "costs").set_index(["data", "training"])
    assert costs.loc[("cifar10, basic", "NRS"), "baselines"] == "2.00"
    assert costs.loc[("cifar10, basic", "NRS"), "time per step (ms)"] == "200.0"
    assert costs.loc[("imagenet2012, flip", "NRS"), "baselines"] == ""


def test_settings_that_differ_are_arms_of_their_own(folder: Path) -> None:
    recipe = recipes()["cifar10-wide_resnet_28_10-basic-nrs"]
    for eps in (0.05, 0.5):
        write_run(folder / f"eps-{eps}", replace(recipe, eps=eps), 0, test_accuracy=0.9)
    runs = read_runs([folder])
    arms = ["baseline", "RPR", "NRS, eps=0.1", "NRS, eps=0.05", "NRS, eps=0.5"]
    assert set(runs[runs["dataset"] == "cifar10"]["arm"]) == set(arms)
    cells = table(runs, "table1").set_index("training")["cifar10, basic"]
    assert cells["NRS, eps=0.5"] == "90.00 [96.94 ± 0.17]"


def test_a_file_of_runs_is_read_and_written(folder: Path, tmp_path: Path) -> None:
    runs = read_runs([folder])
    report.write_report(runs, tmp_path / "report")
    again = read_runs([tmp_path / "report" / "runs.csv"])
    names = ["dataset", "network", "arm", "seed", "test_accuracy"]
    pd.testing.assert_frame_equal(
        runs[names], again[names], check_dtype=False, check_column_type=False
    )


def test_trials_of_sweeps_are_left_out(folder: Path) -> None:
    recipe = recipes()["cifar10-vgg16-basic-nrs"]
    write_run(folder / "trial", recipe, 0, validation_accuracy=0.9)
    assert "vgg16" not in set(read_runs([folder])["network"])


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
