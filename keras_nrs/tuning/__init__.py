"""Comparison of settings on a user's data: `keras_nrs.tune`."""

from keras_nrs.tuning.result import TuneResult as TuneResult
from keras_nrs.tuning.search import tune as tune

__all__ = ["TuneResult", "tune"]
