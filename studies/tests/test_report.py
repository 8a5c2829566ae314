"""The report of runs that were never done, whose numbers are known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from keras_nrs.experiments.paired_tests import holm
from studies import report
from studies.arms import ARMS
from studies.arms import BASELINE
from studies.arms import DEFAULT
from studies.arms import TWICE
from studies.measures import compared
from studies.measures import measurements
from studies.measures import validation_gains
from studies.store import Row
from studies.store import Run
from studies.store import Store
from studies.tests.made_up import fill

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

TASK = "mnist1d-cnn-1000"
MLP = "fashion-mlp-3000"
NRS, SAM = "NRS, filterwise", "SAM"
GAIN = {BASELINE: 0.0, TWICE: 0.01, NRS: 0.05, SAM: 0.0}


def measured(run: Run) -> Row:
    """An arm's gain over the baseline is known, up to a zero mean of the seeds."""
    gain = GAIN[run.arm]
    if run.stage == "choice":
        rate = 0.01 * (run.settings["learning_rate"] == 0.2)
        eps = 0.01 * (run.settings.get("eps") == 0.3)
        accuracy = 0.7 + gain + rate + eps
        found = {"validation_accuracy": accuracy, "validation_loss": 1.0}
        if run.arm == SAM and run.settings["eps"] == 0.5:
            found["validation_failed"] = True
        return found
    if run.arm == SAM and run.seed == 3:
        return {"accuracy": 0.1, "loss": np.log(10), "failed": True}
    spread = 0.01 * (-1) ** run.seed
    is_baseline = run.arm == BASELINE
    accuracy = 0.8 + gain + 0.001 * run.seed + spread * is_baseline
    return {
        "accuracy": accuracy,
        "loss": 1 - gain + spread * is_baseline,
        "rounded_2_filter": accuracy / 2,
        "calibration_error": 0.1,
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("runs"))
    fill(made, [(TASK, arm) for arm in GAIN], measured)
    return made


def test_holm_by_hand() -> None:
    p = pd.Series([0.03, np.nan, 0.01, 0.02, 0.9])
    # Times 4 for the smallest, then 3, 2, 1; never below a smaller one's.
    np.testing.assert_allclose(holm(p), [0.06, np.nan, 0.04, 0.06, 0.9])


def test_differences_are_paired_and_adjusted(store: Store) -> None:
    found = compared(measurements(store, TASK), "accuracy")
    found = found.set_index(["arm", "reference"])
    test = found.loc[(NRS, BASELINE)]
    assert test["n"] == 10
    assert test["mean"] == pytest.approx(0.05)
    # Differences are 5 points plus or minus 1: a standard error of 1 / 3.
    assert test["error"] == pytest.approx(0.01 / 3)
    assert found.loc[(NRS, TWICE)]["mean"] == pytest.approx(0.04)
    assert (BASELINE, TWICE) not in found.index
    assert (found["adjusted"].dropna() >= found["p"].dropna()).all()


def test_a_failed_run_counts_at_chance(store: Store) -> None:
    runs = measurements(store, TASK)
    failed = runs[runs["failed"]]
    assert failed[["arm", "seed"]].to_numpy().tolist() == [[SAM, 3]]
    assert failed["rounded_2_filter"].tolist() == [0.1]
    assert failed["calibration_error"].isna().all()
    assert report.failures(store, {TASK: runs}) == [
        f"Failed test runs, at chance: {TASK}: SAM, seed 3.",
        f"Failed runs of the choice: {TASK}: SAM (3).",
    ]


def test_the_page_gets_tables_and_a_figure_between_its_markers(
    store: Store, tmp_path: Path
) -> None:
    page, readme = tmp_path / "results.md", tmp_path / "README.md"
    cost = tmp_path / "cost.md"
    for path in (page, readme, cost):
        path.write_text(f"Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n")
    report.write_report(store, page, tmp_path / "study", readme, cost)
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["Before", report.BEGIN]
    columns = list(report._README_ARMS.values())
    assert lines[2] == f"| {' | '.join(['accuracy, points', *columns])} |"
    title = "MNIST-1D, 1,000 sequences, a CNN"
    # Arms that are not in the store have empty cells.
    cells = dict(zip(columns, lines[4].split(" | ")[1:], strict=True))
    assert lines[4].startswith(f"| {title} |")
    assert cells["baseline, twice the epochs"] == "**+1.0 ± 0.8**"
    assert cells["NRS relative, tuned"].strip() == ""
    assert lines[5:] == [report.END, "After"]
    text = page.read_text()
    assert text.startswith("Before\n")
    assert text.endswith(f"{report.END}\nAfter\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {NRS} |"))
    assert "perturbation filterwise, alpha 1.0, eps 0.3" in row.replace(
        "eps 0.3, alpha 1.0", "alpha 1.0, eps 0.3"
    )
    assert "85.45 ± 0.30" in row
    assert "+5.00 ± 0.75 (p < 0.001)" in row
    # Differences are in points, not in percent of the baseline.
    assert "| accuracy - baseline's (points) |" in text
    assert "\n| accuracy, kernels of 2 bits (points) |" in text
    assert "CPU time includes" not in text
    assert "Not run" in text
    assert "fashion-vit-2000 (all arms)" in text
    # An arm that cannot train a task is not missing there.
    assert text.partition("Not run")[2].count("NRS, EMA as the reference") == 1
    assert (tmp_path / "study" / report.FIGURE).stat().st_size > 1000
    report.write_report(store, page, tmp_path / "study", readme, cost)
    assert page.read_text() == text


def test_other_outcomes_are_means_over_tasks_that_have_all_arms(
    tmp_path: Path,
) -> None:
    def measured(run: Run) -> Row:
        gain = 0.02 * (run.arm == SAM) * (1 if run.task == TASK else 3)
        loss = 1 + 0.1 * run.seed - gain
        if run.stage == "choice":
            return {"validation_accuracy": 0.7, "validation_loss": 1.0}
        return {"accuracy": 0.8 + gain, "loss": loss, "calibration_error": 0.1 + gain}

    store = Store(tmp_path)
    arms = [BASELINE, *report._README_ARMS]
    fill(store, [(task, arm) for task in (TASK, MLP) for arm in arms], measured)
    fill(store, [("fashion-vit-2000", BASELINE)], measured)
    vit = "fashion-vit-2000"
    runs = {task: measurements(store, task) for task in (TASK, vit, MLP)}
    lines = report.gains(runs).splitlines()
    assert lines[4].startswith("| *others, mean of rows 1, 2:* |")
    assert lines[5].endswith("| -0.040 |")
    assert lines[6].endswith("| +4.0 |")
    # The others were not measured.
    assert len(lines) == 7


def test_what_less_than_two_trainings_gain(tmp_path: Path) -> None:
    def measured(run: Run) -> Row:
        if run.stage == "choice":
            return {"validation_accuracy": 0.7, "validation_loss": 1.0}
        gain = 0.02 * (run.arm == "NRS, half of each batch")
        return {"accuracy": 0.8 + gain, "loss": 1 + 0.1 * run.seed - gain}

    store = Store(tmp_path)
    arms = [BASELINE, *report._BELOW_TWO]
    fill(store, [(task, arm) for task in (TASK, MLP) for arm in arms], measured)
    runs = {task: measurements(store, task) for task in (TASK, MLP)}
    of_sam = runs[MLP]["arm"] == SAM
    runs[MLP] = runs[MLP][~of_sam | (runs[MLP]["seed"] < 9)]
    heading, _, *lines = report.below_two(runs).splitlines()
    title = "MNIST-1D, 1,000 sequences, a CNN"
    # The MLP lacks a run of SAM, and the store has no rounded kernels.
    assert heading == (
        f"| training | cost | {title}: accuracy (points) | {title}: loss (nats) |"
    )
    assert lines[0] == "| RPR | 1 | +0.00 ± 0.00 | +0.000 ± 0.000 |"
    (line,) = (line for line in lines if line.startswith("| NRS, half of each batch"))
    assert line.startswith("| NRS, half of each batch | 1.5 | +2.00")
    assert "-0.020" in line
    costs = [line.split(" | ")[1] for line in lines]
    assert costs[1:4] == ["1", "1.3", "1.3"]
    assert costs == sorted(costs, key=float)


def test_the_worst_difference_of_the_default() -> None:
    spread = 0.001 * (-1.0) ** np.arange(10)
    runs = {
        task: pd.DataFrame(
            {
                "arm": [BASELINE] * 10 + [DEFAULT] * 10,
                "seed": [*range(10)] * 2,
                "accuracy": [*[0.8] * 10, *(0.8 + gain + spread)],
            }
        )
        for task, gain in (("a", 0.02), ("b", -0.01), ("c", 0.0))
    }
    # 2.262 times 0.1054 points by the root of 10.
    assert report.worst_of_default(runs) == [
        "The default's worst difference to the baseline, of 3 tasks: -1.00 ± 0.08 "
        "points of accuracy, b."
    ]
    assert report.worst_of_default({"a": runs["a"][:10]}) == []


def test_a_page_without_markers_and_a_store_without_runs_are_errors(
    store: Store, tmp_path: Path
) -> None:
    page = tmp_path / "results.md"
    page.write_text("Before")
    with pytest.raises(ValueError, match="must have the lines"):
        report.write_report(store, page, tmp_path, page, page)
    page.write_text(f"{report.BEGIN}\n{report.END}")
    with pytest.raises(ValueError, match="finished test runs"):
        report.write_report(Store(tmp_path / "empty"), page, tmp_path, page, page)


def test_validation_gains_of_settings(store: Store) -> None:
    gains = validation_gains(store, [TASK])
    # NRS gains 5 points, and one more with eps 0.3, over the baseline's best.
    assert gains["worst"].iloc[0] == pytest.approx(0.06)
    assert gains["worst"].iloc[-1] == pytest.approx(0.05)
    assert gains.index[0].startswith("filterwise, eps 0.3, alpha")
    assert len(gains) == len(ARMS[NRS].choices)
    assert "+6.00" in report.defaults_table(store)
