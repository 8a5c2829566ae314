"""The demo's table and figure, from runs that the test makes up."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from keras_nrs.experiments import demo
from keras_nrs.experiments import demo_report

# Nothing here depends on the backend; this one starts soonest.
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


def test_the_table_has_all_arms(runs: list[demo.Run]) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(demo_report.results_table(runs))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert rows == list(demo.ARMS)
    accuracy = 100 * np.mean([r.test_accuracy for r in runs if r.arm == demo.NRS])
    assert f"{accuracy:.2f} ±" in text
    gains = [
        100 * (run.test_accuracy - baseline.test_accuracy)
        for run, baseline in zip(runs[-3:], runs[:3], strict=True)
    ]
    # With two degrees of freedom the 97.5 % quantile of Student's t is 4.3027.
    width = 4.3027 * np.std(gains, ddof=1) / np.sqrt(3)
    assert f"{np.mean(gains):+.2f} ± {width:.2f}" in text


def test_the_figure_is_a_png(runs: list[demo.Run], tmp_path: Path) -> None:
    demo_report.draw_results(runs, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
