"""Differences to the baseline, paired by seed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from keras_nrs.experiments.paired_tests import adjusted
from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.results import read_runs

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_differences_are_those_of_a_paired_t_test(folder: Path) -> None:
    runs = read_runs([folder])
    found = paired_differences(runs, "test_accuracy").set_index("arm")
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
    ratio = paired_differences(runs, "last_layer_eigenvalue", log=True)
    eigenvalues = cifar.pivot(
        index="seed", columns="arm", values="last_layer_eigenvalue"
    )
    expected_mean = np.log(eigenvalues["NRS"] / eigenvalues["baseline"]).mean()
    assert ratio.set_index("arm").loc["NRS", "mean"] == pytest.approx(expected_mean)


def test_equal_runs_are_no_evidence(folder: Path) -> None:
    runs = read_runs([folder])
    runs["test_accuracy"] = 0.5
    found = paired_differences(runs, "test_accuracy")
    assert (found["p"] == 1).all()
    assert (found["width"] == 0).all()


def test_pairs_need_the_seed_in_both_arms(folder: Path) -> None:
    runs = read_runs([folder])
    without = runs[~((runs["arm"] == "baseline") & (runs["seed"] == 1))]
    found = paired_differences(without, "test_accuracy").set_index("arm")
    assert list(found["n"]) == [2, 2]


def test_adjusted_p_values() -> None:
    p = pd.Series([0.01, np.nan, 0.04, 0.03], index=[3, 4, 5, 6])
    # Benjamini and Hochberg: n p / rank, made monotone from the largest down.
    np.testing.assert_allclose(adjusted(p), [0.03, np.nan, 0.04, 0.04])
