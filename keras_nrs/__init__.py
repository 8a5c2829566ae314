"""Neighborhood Region Smoothing: flat-minima regularization for Keras 3 models."""

from keras_nrs import callbacks as callbacks
from keras_nrs import divergences as divergences
from keras_nrs import perturbations as perturbations
from keras_nrs.calibration import CalibratedEps as CalibratedEps
from keras_nrs.calibration import calibrate_eps as calibrate_eps
from keras_nrs.nrs_model import NRSModel as NRSModel
from keras_nrs.nrs_model import unwrap as unwrap
from keras_nrs.nrs_model import wrap as wrap
from keras_nrs.objective import nrs_objective as nrs_objective

__version__ = "0.1.0.dev0"
