"""Results of the trials of a sweep."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from keras_nrs.experiments.trials import Result
from keras_nrs.experiments.trials import best_first
from keras_nrs.experiments.trials import to_table
from keras_nrs.experiments.trials import write_csv

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


BEST = Result({"eps": 0.3}, 9, (0.8, 0.9), 2.0)
WORSE = Result({"eps": 0.1}, 9, (0.5, 0.7), 3.0)
PARTIAL = Result({"eps": 0.2}, 3, (0.9, 0.9), 1.0, is_whole=False)
DIVERGED = Result({"eps": 0.9}, 9)


def test_whole_trials_come_first_and_diverged_ones_last() -> None:
    earlier = Result({"eps": 0.3}, 3, (1.0, 1.0), 1.0, is_whole=False)
    results = best_first([DIVERGED, PARTIAL, earlier, WORSE, BEST])
    assert results == [BEST, WORSE, PARTIAL, DIVERGED]


def test_a_long_name_is_cut_off_and_stays_its_own() -> None:
    values = {f"key_number_{i}": i / 7 for i in range(17)}
    names = {Result(values | {"eps": eps}, 9).name for eps in (0.1, 0.2)}
    assert [len(name) for name in names] == [255, 255]
    assert len({name[:200] for name in names}) == 1


def test_results_as_text() -> None:
    assert str(BEST) == "0.8500 ± 0.0707"
    assert str(Result({}, 9, (0.5,))) == "0.5000"
    console = Console(file=io.StringIO(), width=100)
    console.print(to_table("name", [BEST, DIVERGED], console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.8500 ± 0.0707" in text
    assert "diverged" in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("number", [3, 6])
def test_the_table_cuts_nothing(width: int, number: int) -> None:
    values = {"learning_rate": 0.012345, "weight_decay": 0.0012345, "batch_size": 256}
    values |= {"eps": 0.1234, "alpha": 1.234, "perturbation": "adaptive_ascent"}
    values = dict(list(values.items())[:number])
    console = Console(file=io.StringIO(), width=width)
    result = Result(values, 200, (0.9, 0.91), 123456.7)
    console.print(to_table("name", [result], console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (*values, *values.values(), "200", str(result), "123457"):
        assert str(part) in text
    assert ("learning_rate=" in text) == (width == 80 and number == 6)


def test_the_csv_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "trials.csv", [PARTIAL, DIVERGED], seeds=[4, 5])
    assert (tmp_path / "trials.csv").read_text() == (
        "eps,epochs,validation_accuracy,seed-4,seed-5,seconds\n"
        "0.2,3,0.9,0.9,0.9,1.0\n"
        "0.9,9,nan,diverged,diverged,nan\n"
    )
