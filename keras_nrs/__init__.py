"""Neighborhood Region Smoothing: flat-minima regularization for Keras 3 models."""

import importlib
from typing import TYPE_CHECKING
from typing import Any

from keras_nrs import callbacks as callbacks
from keras_nrs import divergences as divergences
from keras_nrs import perturbations as perturbations
from keras_nrs.batch_norm import update_batch_norm as update_batch_norm
from keras_nrs.calibration import CalibratedEps as CalibratedEps
from keras_nrs.calibration import calibrate_eps as calibrate_eps
from keras_nrs.nrs_model import NRSModel as NRSModel
from keras_nrs.step.objective import nrs_objective as nrs_objective
from keras_nrs.versions import show_versions as show_versions
from keras_nrs.wrapping import unwrap as unwrap
from keras_nrs.wrapping import wrap as wrap

__version__ = "0.1.0"

__all__ = [
    "CalibratedEps",
    "NRSModel",
    "TuneResult",
    "calibrate_eps",
    "callbacks",
    "data",
    "divergences",
    "flatness",
    "models",
    "nrs_objective",
    "perturbations",
    "show_versions",
    "tune",
    "unwrap",
    "update_batch_norm",
    "wrap",
]

if TYPE_CHECKING:
    from keras_nrs import data as data
    from keras_nrs import flatness as flatness
    from keras_nrs import models as models
    from keras_nrs.tuning import TuneResult as TuneResult
    from keras_nrs.tuning import tune as tune


def __getattr__(name: str) -> Any:
    # At their first use: they need packages that are extras, or take time to import.
    if name in ("data", "flatness", "models"):
        return importlib.import_module(f"keras_nrs.{name}")
    if name in ("TuneResult", "tune"):
        return getattr(importlib.import_module("keras_nrs.tuning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
