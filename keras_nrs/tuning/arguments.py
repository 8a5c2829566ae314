"""The data and the arguments of `fit()` that a user gives to `tune()`, checked."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_nrs._checks import check_fraction
from keras_nrs._checks import check_int
from keras_nrs.batches import check_data

Row = dict[str, Any]

_DATA_NAMES = ("x", "y", "sample_weight")
_OF_TUNE = ("self", "x", "y", "validation_data", "verbose", "initial_epoch")
_FIT_ARGUMENTS = [
    name
    for name in inspect.signature(keras.Model.fit).parameters
    if name not in _OF_TUNE
]


def check_fit(fit: Any) -> Row:
    """The arguments of `fit()` that a user gives, or an error that names one."""
    if not isinstance(fit, dict) or "epochs" not in fit:
        raise ValueError(
            "`fit` must be a dict of arguments of fit() with the number of epochs, "
            f"such as {{'epochs': 20, 'batch_size': 32}}. Received: fit={fit!r}."
        )
    unknown = [name for name in fit if name not in _FIT_ARGUMENTS]
    if unknown:
        raise ValueError(
            f"`fit` must have keys among {_FIT_ARGUMENTS}. Received: {unknown}."
        )
    check_int("fit['epochs']", fit["epochs"], minimum=1)
    callbacks = fit.get("callbacks") or []
    if not callable(callbacks):
        for callback in keras.tree.flatten(callbacks):
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                raise ValueError(
                    "`fit` must not have a BackupAndRestore, which would go on from "
                    "the training before. Pass `folder` to tune(): finished trainings "
                    "are not repeated."
                )
    return dict(fit)


def split_data(x: Any, y: Any, validation_data: Any, fit: Row) -> tuple[Row, Row, Row]:
    """Training data, validation data, and the other arguments of `fit()`.

    Raises:
        TypeError, ValueError: if there are no validation data, or twice, or data can
            be read but once.
    """
    fit = dict(fit)
    share = fit.pop("validation_split", 0) or None
    if (share is None) == (validation_data is None):
        raise ValueError(
            "`validation_data` must be given, or a `validation_split` in `fit`: one of "
            f"them. Received: validation_data of type {type(validation_data).__name__} "
            f"and validation_split={share!r}."
        )
    data = {"x": x, "y": y, "sample_weight": fit.pop("sample_weight", None)}
    data = _checked("x", data)
    if share is None:
        parts = validation_data
        is_arrays = isinstance(parts, tuple | list)
        parts = keras.utils.unpack_x_y_sample_weight(
            tuple(parts) if is_arrays else parts
        )
        validation = dict(zip(_DATA_NAMES, parts, strict=True))
        return data, _checked("validation_data", validation), fit
    check_fraction("fit['validation_split']", share)
    if y is None:
        raise ValueError(
            "`fit` must not have a `validation_split` where `x` is a data set. Pass "
            "`validation_data`."
        )
    return *_split(data, share), fit


def _split(data: Row, share: float) -> tuple[Row, Row]:
    """Training and validation samples, always the same ones."""
    num = len(keras.tree.flatten(data["x"])[0])
    order = np.random.default_rng(0).permutation(num)
    num_validation = round(share * num)
    if not 0 < num_validation < num:
        raise ValueError(
            "`fit` must have a `validation_split` that leaves samples on both sides. "
            f"Received: validation_split={share} of {num} samples."
        )

    def chosen(indices: Any) -> Row:
        return keras.tree.map_structure(
            lambda a: keras.ops.convert_to_numpy(a)[indices], data
        )

    return chosen(order[num_validation:]), chosen(order[:num_validation])


def _checked(name: str, data: Row) -> Row:
    """Data without what is not there, or an error that names the argument."""
    if isinstance(data["x"], Iterator):
        raise TypeError(
            f"`{name}` must be arrays, or a data set that can be read again for each "
            f"training. Received: {name} of type {type(data['x']).__name__}."
        )
    is_arrays = check_data(**data)
    if is_arrays and data["y"] is None:
        raise ValueError(
            f"`{name}` must come with labels. Received: arrays without `y`."
        )
    return {key: value for key, value in data.items() if value is not None}


def as_tuple(data: Row) -> Any:
    values = tuple(data[name] for name in _DATA_NAMES if name in data)
    return values if len(values) > 1 else values[0]
