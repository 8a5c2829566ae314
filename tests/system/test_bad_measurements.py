"""Across modules: bad input to callbacks, calibration and flatness."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import flatness
from keras_nrs.callbacks import FlatnessMonitor
from keras_nrs.callbacks import NRSSchedule
from tests.support.bad_input import LABELS
from tests.support.bad_input import NAN
from tests.support.bad_input import X
from tests.support.bad_input import Y
from tests.support.bad_input import fit
from tests.support.bad_input import linear
from tests.support.bad_input import row
from tests.support.bad_input import spoiled
from tests.support.bad_input import truncated
from tests.support.bad_input import without_weights
from tests.support.matrix import rest


def calibrated(model: keras.Model, x: Any = X, **options: Any) -> None:
    keras_nrs.calibrate_eps(model, x, **({"target_divergence": 0.1} | options))


def landscape() -> flatness.Landscape:
    return flatness.Landscape(coordinates=(np.arange(3.0),), losses=np.zeros(3))


def measure_from_truncated_checkpoint() -> None:
    landscape().save("a.npz")
    path = truncated("a.npz")
    flatness.loss_landscape(linear(), X, Y, num_points=3, checkpoint=path)


def density() -> flatness.SpectralDensity:
    ones = np.ones((1, 2))
    return flatness.SpectralDensity(
        nodes=ones, weights=ones / 2, size=2, num_products=2
    )


CALIBRATION = [
    row(
        "perturbation=''",
        ValueError,
        "`perturbation`",
        calibrated,
        linear(),
        perturbation="",
    ),
    row(
        "divergence=[]", ValueError, "`divergence`", calibrated, linear(), divergence=[]
    ),
    row("uncompiled", ValueError, r"compile\(loss=", calibrated, linear("uncompiled")),
    row("no weights", ValueError, "must have trainable", calibrated, without_weights()),
    row("NaN weights", ValueError, "must have finite outputs", calibrated, spoiled()),
    row(
        "NaN inputs",
        ValueError,
        "must have finite outputs",
        calibrated,
        linear(),
        X * NAN,
    ),
    row("seed", ValueError, "`seed` must be", calibrated, linear(), seed=2**31),
]
CALLBACKS = [
    row("eps=nan", ValueError, "`eps` must be finite", NRSSchedule, NAN),
    row(
        "warm-up", TypeError, "`warmup_epochs` must be", NRSSchedule, warmup_epochs=1.5
    ),
    row(
        "eps of an epoch",
        TypeError,
        "`eps` must be a number",
        fit,
        linear(),
        callbacks=[NRSSchedule(eps=lambda epoch: "a")],  # type: ignore[arg-type,return-value]
    ),
    row("x=None", TypeError, "`x` must be an array", FlatnessMonitor, None),
    row("x=[]", ValueError, "None where `x` is not arrays", FlatnessMonitor, [], Y),
    row("x of lists", TypeError, "`x` must be an array", FlatnessMonitor, X.tolist()),
    row("no data", ValueError, "at least one", FlatnessMonitor, X[:0], Y[:0]),
    row("5 labels", ValueError, "one number of samples", FlatnessMonitor, X, Y[:5]),
    row("list of labels", TypeError, "`y` must be an", FlatnessMonitor, X, Y.tolist()),
    row("no labels", ValueError, "`y` must be labels", FlatnessMonitor, X),
    row("k=1.5", TypeError, "`k` must be an integer", FlatnessMonitor, X, Y, k=1.5),
    row("eps=inf", ValueError, "`eps`", FlatnessMonitor, X, Y, eps=float("inf")),
    *(
        row(
            f"{name}={given}",
            ValueError,
            f"`{name}` must be a dict with keys among",
            FlatnessMonitor,
            X,
            Y,
            **{name: given},
        )
        for name in ("divergence_options", "eigenvalue_options")
        for given in (3, {"foo": 1}, {"k": 2})
    ),
    *(
        row(
            "monitor with a checkpoint",
            ValueError,
            f"`{name}` must be a dict with keys among",
            FlatnessMonitor,
            X,
            Y,
            **{name: {"checkpoint": "products"}},
        )
        for name in ("divergence_options", "eigenvalue_options")
    ),
    row(
        "monitor of many eigenvalues",
        ValueError,
        "`k` must be at most the number of selected weights, 8",
        lambda: fit(linear(), callbacks=[FlatnessMonitor(X, Y, k=9)]),
    ),
    row(
        "monitor of no variables",
        ValueError,
        "`variables` must be",
        lambda: fit(
            linear(),
            callbacks=[FlatnessMonitor(X, Y, eigenvalue_options={"variables": "a"})],
        ),
    ),
]
FLATNESS = [
    row(
        "no labels",
        ValueError,
        "`y` must be labels.*y=None",
        lambda: flatness.hessian_operator(linear(), X).to_dense(),
    ),
    row(
        "labels",
        ValueError,
        LABELS,
        lambda: flatness.hessian_operator(linear(), X, X[:, [0] * 5]).to_dense(),
    ),
    row(
        "landscape seed",
        TypeError,
        "`seed`",
        flatness.loss_landscape,
        linear(),
        X,
        Y,
        seed="a",
    ),
    *(
        row(
            f"directions={d}",
            TypeError,
            "`directions` must be",
            flatness.loss_landscape,
            linear(),
            X,
            Y,
            directions=d,
        )
        for d in (None, 1.5, True, [3])
    ),
    row(
        "vector",
        ValueError,
        r"shape \(8,\).*shape \(3,\)",
        lambda: flatness.hessian_operator(linear(), X, Y).split(np.ones(3)),
    ),
    row("damaged", ValueError, "is damaged", measure_from_truncated_checkpoint),
    row(
        "landscapes",
        TypeError,
        "`landscapes` must be a dict",
        flatness.draw_landscapes,
        [landscape()],
    ),
    row(
        "landscape of 3",
        TypeError,
        "`landscapes` must be a dict",
        flatness.draw_landscapes,
        {"a": 3},
    ),
    row("no landscape", TypeError, "at least one", flatness.draw_landscapes, {}),
    row("no density", TypeError, "at least one", flatness.draw_densities, {}),
    row("densities", TypeError, "`densities` must be", flatness.draw_densities, [3]),
    row(
        "bandwidth=0",
        ValueError,
        "`bandwidth` must be > 0",
        lambda: density().plot(bandwidth=0),
    ),
    row(
        "moment", TypeError, "`order` must be an integer", lambda: density().moment("a")
    ),
    row(
        "divergence=''",
        ValueError,
        "`divergence`",
        flatness.model_divergence,
        linear(),
        X,
        eps=0.1,
        divergence="",
    ),
    row(
        "divergence eps",
        ValueError,
        "`eps`",
        flatness.model_divergence,
        linear(),
        X,
        eps=NAN,
    ),
    row(
        "interpolate",
        TypeError,
        "`model` must be a",
        flatness.interpolate,
        linear(),
        None,
        X,
        Y,
    ),
]


@pytest.mark.parametrize(
    ("function", "error", "match"), [*CALIBRATION, *rest(*CALLBACKS, *FLATNESS)]
)
@pytest.mark.usefixtures("in_tmp_path")
def test_bad_input(
    function: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=re.compile(match, re.DOTALL)):
        function()
