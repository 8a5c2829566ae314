"""Tables of made-up runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.report import write_report
from keras_nrs.experiments.report_tables import tables
from keras_nrs.experiments.results import read_runs
from tests.experiments.runs import write_run

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def table(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    (found,) = [t.cells for t in tables(runs) if t.name == name]
    return found


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


def write_runs(folder: Path, scheme: str, accuracy: float, **changes: Any) -> None:
    """Made-up runs of a cell of CIFAR-10 with three seeds."""
    recipe = replace(recipes()[f"cifar10-resnet18-basic-{scheme}"], **changes)
    for seed in range(3):
        text = "-".join(f"{name}={value}" for name, value in changes.items())
        write_run(
            folder / f"{scheme}-{text}" / f"seed-{seed}",
            recipe,
            seed,
            test_accuracy=accuracy + seed**2 / 1000,
            test_cross_entropy=0.2,
            seconds_per_step=accuracy,
        )


@pytest.mark.parametrize(
    ("setting", "theirs", "ours"),
    [
        ("epochs", 5, 200),
        ("batch_size", 128, 256),
        ("clip_norm", None, 2.5),
        ("validation_percent", 10, 0),
        ("dtype_policy", "mixed_bfloat16", "float32"),
    ],
)
def test_runs_with_other_settings_are_not_compared(
    setting: str, theirs: Any, ours: Any, tmp_path: Path
) -> None:
    write_runs(tmp_path, "baseline", 0.9, **{setting: theirs})
    write_runs(tmp_path, "nrs", 0.93, **{setting: ours})
    runs = read_runs([tmp_path])
    assert list(dict.fromkeys(runs["arm"])) == [
        f"baseline, {setting}={theirs}",
        f"NRS, {setting}={ours}",
    ]
    assert paired_differences(runs, "test_accuracy").empty
    (row,) = table(runs, "differences").to_dict("records")
    wanted = f"baseline, {setting}={ours}"
    assert row["difference"] == f"no run of '{wanted}' with its seeds"
    assert table(runs, "costs")["baselines"].tolist() == ["1.00", ""]


def test_each_arm_is_compared_with_the_baseline_of_its_settings(tmp_path: Path) -> None:
    for rate, accuracy in ((0.1, 0.9), (0.05, 0.8)):
        write_runs(tmp_path, "baseline", accuracy, learning_rate=rate)
        write_runs(tmp_path, "nrs", accuracy + 0.01 * rate, learning_rate=rate)
    # No deviation: the differences have no interval. One seed is moved.
    runs = read_runs([tmp_path])
    moved = (runs["scheme"] == "nrs") & (runs["seed"] == 2)
    runs.loc[moved, "test_accuracy"] += 0.003
    for made in (runs, read_again(runs, tmp_path)):
        cells = table(made, "differences").set_index("training")
        assert cells["difference"].to_dict() == {
            "NRS, learning_rate=0.1": "+0.20 ± 0.43",
            "NRS, learning_rate=0.05": "+0.15 ± 0.43",
        }
        costs = table(made, "costs").set_index("training")["baselines"]
        assert costs["NRS, learning_rate=0.05"] == "1.00"


def read_again(runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The runs after a report has written them to a file."""
    write_report(runs, folder / "report")
    return read_runs([folder / "report" / "runs.csv"])


def test_arms_without_a_run_of_the_same_seed_are_named(folder: Path) -> None:
    runs = read_runs([folder])
    runs.loc[runs["arm"] == "RPR", "seed"] += 10
    cells = table(runs, "differences").set_index("training")
    assert cells.loc["RPR", "difference"] == "no run of 'baseline' with its seeds"
    assert cells.loc["RPR", "p"] == ""


def test_the_mean_over_cells(folder: Path) -> None:
    runs = read_runs([folder])
    cifar = runs[runs["dataset"] == "cifar10"]
    other = cifar.assign(augmentation="cutout")
    both = pd.concat([cifar, other], ignore_index=True)
    cells = table(both, "overall_test_accuracy").set_index("training")
    found = paired_differences(cifar, "test_accuracy").set_index("arm")
    mean, error = found.loc["NRS", ["mean", "error"]]
    # Two independent cells: the error of their mean is smaller by sqrt(2). With four
    # degrees of freedom the 97.5 % quantile is 2.7764.
    width = 2.7764 * error / 2**0.5
    assert (
        cells.loc["NRS", "mean difference"] == f"{100 * mean:+.2f} ± {100 * width:.2f}"
    )
    assert cells.loc["NRS", "cells"] == 2
    assert cells.loc["NRS", "highest"].endswith("(cifar10, basic, WideResNet-28-10)")


def test_costs_are_in_baselines(folder: Path) -> None:
    costs = table(read_runs([folder]), "costs").set_index(["data", "training"])
    assert costs.loc[("cifar10, basic", "NRS"), "baselines"] == "2.00"
    assert costs.loc[("cifar10, basic", "NRS"), "time per step (ms)"] == "200.0"
    assert costs.loc[("imagenet2012, flip", "NRS"), "baselines"] == ""


def runs_of_file(folder: Path, heading: str, *rows: str) -> pd.DataFrame:
    """Runs of a file with one more column than it must have."""
    first = f"dataset,network,augmentation,arm,seed,test_accuracy,{heading}"
    (folder / "runs.csv").write_text("\n".join([first, *rows]) + "\n")
    return read_runs([folder / "runs.csv"])


def test_imagenet_in_a_file_without_top_5_accuracies(tmp_path: Path) -> None:
    row = "imagenet2012,imagenet_resnet50,flip,baseline,0,0.75,0.9"
    (cells,) = table(runs_of_file(tmp_path, "test_loss", row), "table2").to_dict(
        "records"
    )
    assert cells["top-1 accuracy"] == "75.00 [75.45 ± 0.15]"
    assert "top-5 accuracy" not in cells


def test_costs_that_are_missing_or_zero(tmp_path: Path) -> None:
    cell, other = "digits,a,none", "digits,b,none"
    runs = runs_of_file(
        tmp_path,
        "seconds_per_step",
        *(f"{cell},baseline,0,0.9,", f"{cell},NRS,0,0.9,0.1"),
        *(f"{other},baseline,0,0.9,0", f"{other},NRS,0,0.9,0.1"),
    )
    costs = table(runs, "costs")
    assert costs["time per step (ms)"].tolist() == ["", "100.0", "0.0", "100.0"]
    assert costs["baselines"].tolist() == [""] * 4


def test_an_eigenvalue_that_is_not_positive_has_no_ratio(tmp_path: Path) -> None:
    cell = "digits,a,none"
    rows = [
        *(f"{cell},baseline,{seed},0.9,2" for seed in range(2)),
        *(f"{cell},RPR,{seed},0.9,1" for seed in range(2)),
        *(f"{cell},NRS,{seed},0.9,{seed - 0.5}" for seed in range(2)),
    ]
    runs = runs_of_file(tmp_path, "eigenvalue", *rows)
    ratios = table(runs, "table3").set_index("training")["ratio, all weights"]
    assert ratios.to_dict() == {"baseline": "", "RPR": "0.50", "NRS": ""}


def test_settings_that_differ_are_arms_of_their_own(folder: Path) -> None:
    recipe = recipes()["cifar10-wide_resnet_28_10-basic-nrs"]
    for eps in (0.05, 0.5):
        write_run(folder / f"eps-{eps}", replace(recipe, eps=eps), 0, test_accuracy=0.9)
    runs = read_runs([folder])
    arms = ["baseline", "RPR", "NRS, eps=0.1", "NRS, eps=0.05", "NRS, eps=0.5"]
    assert set(runs[runs["dataset"] == "cifar10"]["arm"]) == set(arms)
    assert set(runs["baseline"]) == {"baseline"}
    cells = table(runs, "table1").set_index("training")["cifar10, basic"]
    assert cells["NRS, eps=0.5"] == "90.00 [96.94 ± 0.17]"
