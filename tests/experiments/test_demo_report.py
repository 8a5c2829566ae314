"""The demo's table and figure, from runs that the test makes up."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from keras_nrs.experiments import demo
from keras_nrs.experiments import demo_report

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch


@pytest.fixture
def runs() -> list[demo.Run]:
    rng = np.random.default_rng(0)
    names = ("test_accuracy", "test_loss", "model_divergence", "eigenvalue")
    return [
        demo.Run(
            arm=arm,
            seed=seed,
            **{name: float(rng.uniform(0.1, 1)) for name in names},
        )
        for arm in demo.ARMS
        for seed in range(3)
    ]


def test_interval_is_that_of_a_paired_t_test() -> None:
    # t of 0.975 with two degrees of freedom is 4.3027, and the deviation is 1.
    mean, interval = demo_report.mean_and_interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2
    assert interval == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)


def test_the_table_has_all_arms(runs: list[demo.Run]) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(demo_report.results_table(runs))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert rows == list(demo.ARMS)
    accuracy = 100 * np.mean([r.test_accuracy for r in runs if r.arm == demo.NRS])
    assert f"{accuracy:.2f} ±" in text


def test_the_figure_is_a_png(runs: list[demo.Run], tmp_path: Path) -> None:
    demo_report.draw_results(runs, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
