"""How the demo's settings are chosen."""

import io

import pytest
from rich.console import Console

from keras_nrs.experiments import demo
from studies import tune_demo

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

TINY = demo.Settings(train_images=20, epochs=2)


def test_tuning_uses_seeds_of_its_own_and_the_validation_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []
    monkeypatch.setattr(tune_demo, "train", lambda *a, seed, **k: trained.append(seed))
    monkeypatch.setattr(tune_demo, "accuracy_and_loss", lambda m, x, y: (len(x), 0))
    model = demo.compiled_model(demo.BASELINE, TINY)
    assert tune_demo.validation_accuracy(model, TINY) == 1000 - TINY.train_images
    assert trained == list(tune_demo.SEEDS)
    assert not set(tune_demo.SEEDS) & set(range(100))


def test_both_grids_have_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_demo, "validation_accuracy", lambda *a, **k: 0.5)
    baseline, nrs = tune_demo.tune_baseline(TINY), tune_demo.tune_nrs(TINY)
    assert len(baseline) == len(nrs) == 20


def test_the_grid_marks_the_best_setting() -> None:
    grid = {(0.1, 1.0): 0.91, (0.1, 2.0): 0.93, (0.2, 1.0): 0.92, (0.2, 2.0): 0.9}
    assert tune_demo.best(grid) == (0.1, 2.0)
    console = Console(file=io.StringIO(), width=80)
    console.print(tune_demo.grid_table("title", "eps", "alpha", grid))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "93.00 *" in text
    assert text.count("*") == 1
