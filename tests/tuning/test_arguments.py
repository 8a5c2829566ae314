"""The data and the arguments of `fit()` that a user gives."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.tuning.arguments import as_tuple
from keras_nrs.tuning.arguments import check_fit
from keras_nrs.tuning.arguments import split_data
from tests.support.data import PyDataset
from tests.support.data import generator
from tests.support.data import image_data

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

X, Y = image_data(20)
WEIGHTS = np.arange(20.0)


def test_validation_data_stay_as_they_are() -> None:
    fit = {"epochs": 1, "sample_weight": WEIGHTS}
    for given in ((X, Y), [X, Y]):
        data, validation, others = split_data(X, Y, given, fit)
        assert data["x"] is X and data["sample_weight"] is WEIGHTS
        assert validation.keys() == {"x", "y"} and validation["y"] is Y
        assert others == {"epochs": 1}
    weighted = split_data(X, Y, (X, Y, WEIGHTS), {"epochs": 1})[1]
    assert as_tuple(weighted) == (X, Y, WEIGHTS)
    dataset = PyDataset(X, Y)
    data, validation, _ = split_data(dataset, None, dataset, {"epochs": 1})
    assert as_tuple(data) is as_tuple(validation) is dataset


def test_a_split_is_random_and_always_the_same() -> None:
    x = {"a": np.arange(20), "b": keras.ops.arange(20)}
    fit = {"epochs": 1, "validation_split": 0.3, "sample_weight": WEIGHTS}
    (data, validation, others), again = (split_data(x, Y, None, fit) for _ in range(2))
    assert others == {"epochs": 1}
    np.testing.assert_array_equal(validation["x"]["a"], again[1]["x"]["a"])
    assert len(validation["y"]) == 6
    for part in (data, validation):
        np.testing.assert_array_equal(part["x"]["a"], part["x"]["b"])
        np.testing.assert_array_equal(part["y"], Y[part["x"]["a"]])
        np.testing.assert_array_equal(part["sample_weight"], part["x"]["a"])
    both = np.concatenate([data["x"]["a"], validation["x"]["a"]])
    assert sorted(both) == list(range(20)) != list(both)


@pytest.mark.parametrize(
    ("x", "y", "validation", "fit", "message"),
    [
        (X, Y, None, {}, "`validation_data` must be given, or a `validation_split`"),
        (X, Y, (X, Y), {"validation_split": 0.1}, "one of them"),
        (X, Y, None, {"validation_split": 2.0}, "must be > 0 and <= 1"),
        (X, Y, None, {"validation_split": 0.01}, "leaves samples on both sides"),
        (PyDataset(X, Y), None, None, {"validation_split": 0.1}, "`x` is a data set"),
        (X, None, (X, Y), {}, "`x` must come with labels"),
        (X, Y, (X,), {}, "`validation_data` must come with labels"),
        (X, Y, X, {}, "`validation_data` must come with labels"),
        (X, Y[:3], (X, Y), {}, "one number of samples"),
        (generator(X, Y), None, (X, Y), {}, "`x` must be arrays, or a data set"),
        (X, Y, generator(X, Y), {}, "`validation_data` must be arrays, or a data set"),
    ],
)
def test_bad_data(x: Any, y: Any, validation: Any, fit: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        split_data(x, y, validation, {"epochs": 1} | fit)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (None, "`fit` must be a dict of arguments"),
        ({}, "`fit` must be a dict of arguments"),
        ({"epochs": 0}, r"`fit\['epochs'\]` must be an integer >= 1"),
        ({"epochs": 1, "batch": 3}, r"Received: \['batch'\]"),
        ({"epochs": 1, "verbose": 1}, r"Received: \['verbose'\]"),
        (
            {"epochs": 1, "callbacks": [keras.callbacks.BackupAndRestore("unused")]},
            "must not have a BackupAndRestore",
        ),
    ],
)
def test_bad_arguments_of_fit(fit: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_fit(fit)
