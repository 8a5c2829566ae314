"""The demo's table and figure, from runs that the test makes up."""

import io
import re
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


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_terminal_and_cuts_nothing(
    runs: list[demo.Run], width: int
) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(demo_report.results_table(runs, console=console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = "arm accuracy test loss (nats) model divergence eigenvalue gain (points)"
    for word in words.split():
        assert word in text
    assert ("standard deviation" in text) == (width == 120)
    lines = [line.strip("│ ") for line in text.splitlines()]
    for arm in demo.ARMS:
        row = re.compile(rf"{re.escape(arm)}[ │]+\d")
        (line,) = filter(row.match, lines)
        losses = [r.test_loss for r in runs if r.arm == arm]
        assert f" {np.mean(losses):.3f}" in line


def _runs(gains: dict[str, list[float]], loss: float = 0.5) -> list[demo.Run]:
    """Runs with gains in points of accuracy over a baseline of 80 %."""
    return [
        demo.Run(
            arm=arm,
            seed=seed,
            test_accuracy=(80 + gains.get(arm, [0.0] * 3)[seed]) / 100,
            test_loss=loss + seed / 100 if arm == demo.NRS else 0.5,
            model_divergence=0.1,
            eigenvalue=1.0,
        )
        for arm in demo.ARMS
        for seed in range(3)
    ]


def test_the_decision_follows_the_paired_interval() -> None:
    # The interval of 1, 2, 3 is 2 +- 2.48, that of 2, 2.1, 2.2 is 2.1 +- 0.25.
    unclear, clear = [1.0, 2.0, 3.0], [2.0, 2.1, 2.2]
    text = demo_report.decision(_runs({demo.NRS: clear}))
    assert text.startswith("use NRS on these data, because it gains +2.10 ± 0.25")
    assert "twice the epochs" in text
    assert "RPR" not in text
    text = demo_report.decision(_runs({demo.NRS: clear, demo.RPR: clear}))
    assert "RPR gains +2.10 ± 0.25 at the cost of a plain step" in text
    text = demo_report.decision(_runs({demo.NRS: unclear}))
    assert text.startswith("keep the baseline on these data")
    assert "not distinguishable from 0: +2.00 ± 2.48 points" in text
    text = demo_report.decision(_runs({demo.NRS: [-x for x in clear]}))
    assert text.startswith("keep the baseline on these data")
    assert "NRS loses: -2.10 ± 0.25" in text


def test_a_lower_loss_is_told_where_the_accuracy_is_not_better() -> None:
    text = demo_report.decision(_runs({demo.NRS: [1.0, 2.0, 3.0]}, loss=0.3))
    assert "Its test loss is lower, -0.190 ± 0.025 nats" in text
    text = demo_report.decision(_runs({demo.NRS: [1.0, 2.0, 3.0]}, loss=0.6))
    assert "loss" not in text
