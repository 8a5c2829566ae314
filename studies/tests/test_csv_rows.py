"""CSV files of rows."""

from pathlib import Path

import pytest

from studies.csv_rows import read_rows
from studies.csv_rows import write_rows

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_values_come_back_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = [{"arm": "NRS, ball", "seed": 1}, {"seed": 2, "loss": 1e-5, "eps": 1.0}]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    text = (tmp_path / "rows.csv").read_bytes()
    assert text == b'arm,seed,loss,eps\n"NRS, ball",1,,\n,2,1e-05,1.0\n'
