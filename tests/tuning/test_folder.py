"""Finished trainings, and the weights of a setting's best one."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs._files import DamagedFileError
from keras_nrs.tuning.folder import Folder
from keras_nrs.tuning.folder import request_of
from keras_nrs.tuning.settings import settings_from
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.tuning.made_up import ACCURACY
from tests.tuning.made_up import row

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

BASELINE, TWICE, NRS = settings_from({"NRS": {}})
KEPT = ACCURACY


def filled(value: float) -> keras.Model:
    model = cnn()
    model.set_weights([np.full_like(w, value) for w in model.get_weights()])
    return model


def test_a_training_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def train() -> Any:
        calls.append(1)
        return row(0.9), cnn()

    for _ in range(2):
        folder = Folder(tmp_path / "new", {"fit": 1})
        for setting, seed in ((BASELINE, 0), (BASELINE, 1), (NRS, 0)):
            assert folder.has(setting, seed, 5) == (len(calls) == 3)
            found = folder.get(setting, seed, 5, train, None)
            assert found["measured"] == {"accuracy": 0.9, "loss": pytest.approx(0.1)}
    assert len(calls) == 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["runs.json"]


def test_the_weights_of_the_best_training_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, {})
    for seed, (accuracy, kept) in enumerate(
        [(0.9, None), (0.5, KEPT), (0.7, KEPT), (0.6, KEPT)]
    ):
        found = row(accuracy), filled(accuracy)
        folder = Folder(tmp_path, {})  # Another call goes on.
        folder.get(NRS, seed, 5, lambda found=found: found, kept)
    failed = row(0.99, failed=True), filled(0.99)
    folder.get(NRS, 9, 5, lambda: failed, KEPT)
    model = cnn()
    folder.load_weights(model, NRS, 5)
    assert np.unique(np.concatenate([w.ravel() for w in model.get_weights()])) == (
        pytest.approx([0.7])
    )
    before = model.get_weights()[0]
    folder.load_weights(model, NRS, 10)
    folder.load_weights(model, BASELINE, 5)
    np.testing.assert_array_equal(model.get_weights()[0], before)
    for path in tmp_path.glob("*.h5"):
        path.unlink()
    with pytest.raises(DamagedFileError, match="it is missing"):
        folder.load_weights(model, NRS, 5)


def test_a_model_that_cannot_be_saved_loses_no_result(tmp_path: Path) -> None:
    class Own(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, of_user: Any) -> None:
            super().__init__()
            self.of_user = of_user

        def call(self, x: Any) -> Any:
            return x

    folder = Folder(tmp_path, {})
    folder.write_result(cnn(), {})
    model = keras.Sequential([keras.Input((3,)), Own(object())])
    with pytest.warns(UserWarning, match="best.keras was not written"):
        folder.write_result(model, {"best": "NRS"})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"best": "NRS"}


X, Y = np.arange(8.0), np.ones(8, "int32")
FIT = {"epochs": 5, "callbacks": [keras.callbacks.EarlyStopping(patience=3)]}


def described(**changes: Any) -> Any:
    parts = {"x": X, "y": Y, "validation": (X, Y), "fit": FIT, "model": cnn()} | changes
    data, validation = ({"x": x, "y": y} for x, y in ((parts["x"], parts["y"]), (X, Y)))
    return request_of(parts["model"], data, validation, parts["fit"])


def recompiled(**kwargs: Any) -> keras.Model:
    model = cnn()
    compile_classifier(model, **kwargs)
    return model


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({}, []),
        ({"model": cnn(dropout=0.1)}, ["model"]),
        ({"model": cnn(penalty=0.1)}, ["model"]),
        ({"model": recompiled(optimizer=keras.optimizers.SGD(0.01))}, ["model"]),
        ({"model": recompiled(loss="mse")}, ["model"]),
        ({"x": X + 1e-3}, ["data"]),
        ({"x": X.reshape(2, 4), "y": X.reshape(2, 4)}, ["data"]),
        ({"fit": FIT | {"epochs": 6}}, ["fit"]),
        (
            {"fit": FIT | {"callbacks": [keras.callbacks.EarlyStopping(patience=4)]}},
            ["fit"],
        ),
        ({"fit": FIT | {"class_weight": {0: 1.0, 1: 2.0}}}, ["fit"]),
        ({"fit": FIT | {"class_weight": {np.int64(0): np.float64(2)}}}, ["fit"]),
    ],
)
def test_what_makes_another_call(changes: Any, differing: list[str]) -> None:
    one, other = described(), described(**changes)
    assert json.loads(json.dumps(one)) == one
    assert [name for name in one if one[name] != other[name]] == differing


def test_equal_parts_are_described_alike() -> None:
    by_int, by_numpy = (
        described(fit=FIT | {"class_weight": {key: 2.0}})["fit"]
        for key in (0, np.int64(0))
    )
    assert by_int == by_numpy

    def of_table(value: float) -> Any:
        return described(x=pd.DataFrame({"a": [value, 2.0], "b": [3, 4]}))["data"]

    pd = pytest.importorskip("pandas")
    assert of_table(1.0) == of_table(1.0) != of_table(5.0)
    assert described()["keras_nrs"] == keras_nrs.__version__


def test_a_folder_of_another_call_is_an_error(tmp_path: Path) -> None:
    Folder(tmp_path, described()).get(NRS, 0, 5, lambda: (row(0.9), cnn()), None)
    with pytest.raises(ValueError, match="another call, whose data and fit differ"):
        Folder(tmp_path, described(x=X + 1, fit={"epochs": 2}))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        Folder(tmp_path / "file", {})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    content = {"settings": {}, "runs": [{"arguments": "{}", "epochs": 5, "seed": 0}]}
    (tmp_path / "runs.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"runs\.json' is damaged"):
        Folder(tmp_path, {})
