"""A user's script, and data by name."""

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.tuning.script import load_data
from keras_nrs.tuning.script import load_factory
from keras_nrs.tuning.task import takes_epochs
from tests.support.networks import cnn

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

FLAT = keras.Sequential([keras.Input((64,)), keras.layers.Dense(2)])


def test_a_factory_comes_from_a_script_that_imports_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "neighbour_of_script.py").write_text("VALUE = 3\n")
    path = tmp_path / "script.py"
    path.write_text(
        "from neighbour_of_script import VALUE\ndef make_model(): return VALUE\n"
    )
    assert load_factory(f"{path}:make_model")() == 3
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Size:\n    units: int = 3\n"
        "def make_model(): return Size().units\nVALUE = 3\n"
        "def wrong(epochs): return len(epochs)\n"
    )
    monkeypatch.delitem(sys.modules, "script", raising=False)
    assert load_factory(f"{path}:make_model")() == 3
    # An error of the user's own code is shown as one.
    wrong = load_factory(f"{path}:wrong")
    assert takes_epochs(wrong)
    with pytest.raises(RuntimeError, match="wrong raised TypeError: object of type"):
        wrong(epochs=3)
    (tmp_path / "bad.py").write_text("int('a')\n")
    with pytest.raises(
        RuntimeError, match=r"bad\.py raised ValueError: invalid literal"
    ):
        load_factory(f"{tmp_path}/bad.py:make_model")
    for name, message in (
        (f"{path}", "must be the path of a Python file and the name"),
        (f"{path}:", "must be the path of a Python file and the name"),
        (f"{tmp_path}/no.py:make_model", "must be the path of a Python file"),
        (f"{path}:make", "Received: 'make', which is missing there"),
        (f"{path}:VALUE", "Received: 'VALUE', which is 3 there"),
    ):
        with pytest.raises(ValueError, match=message):
            load_factory(name)
    (tmp_path / "text.txt").touch()
    with pytest.raises(ValueError, match=r"whose name ends in \.py"):
        load_factory(f"{tmp_path}/text.txt:make_model")


def test_data_by_name(tmp_path: Path) -> None:
    digits = load_data("digits", FLAT)
    assert digits.x.shape == (1000, 64) and digits.y.shape == (1000,)
    assert digits.validation is None
    some = load_data("digits", FLAT, samples=30)
    assert some.x.shape == (30, 64)
    same = load_data("digits", FLAT, samples=30)
    np.testing.assert_array_equal(some.x, same.x)
    path = tmp_path / "data.npz"
    arrays = {"x": np.ones((5, 2)), "y": np.arange(5)}
    np.savez(path, **arrays)
    assert load_data(str(path), cnn()).validation is None
    np.savez(path, **arrays, x_val=np.zeros((3, 2)), y_val=np.zeros(3))
    found = load_data(str(path), cnn(), samples=4)
    assert sorted(found.y) != list(range(5)) and len(found.y) == 4
    assert found.validation is not None and found.validation[0].shape == (3, 2)


def test_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((6, 28, 28), "uint8"), np.arange(6, dtype="uint8")
    loaded: Any = lambda: (images, None)  # noqa: E731
    monkeypatch.setattr("keras_nrs._fashion_mnist.load_fashion_mnist", loaded)
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    found = load_data("fashion-mnist", model)
    assert found.x.shape == (6, 28, 28, 1) and found.y.dtype == "int32"


def test_bad_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones(3))
    for name in ("nothing.npz", "mnist", str(tmp_path / "data.npz")):
        with pytest.raises(
            ValueError, match="`data` must be 'digits', 'fashion-mnist'"
        ):
            load_data(name, FLAT)
    with pytest.raises(ValueError, match="`samples` must be an integer from 2 to 1000"):
        load_data("digits", FLAT, samples=1001)
