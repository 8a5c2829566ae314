"""Measurements of how flat a trained minimum is, for any Keras model."""

from keras_nrs.flatness.curve import Curve as Curve
from keras_nrs.flatness.curve import connect as connect
from keras_nrs.flatness.density import SpectralDensity as SpectralDensity
from keras_nrs.flatness.density import hessian_density as hessian_density
from keras_nrs.flatness.directions import random_direction as random_direction
from keras_nrs.flatness.divergence import ModelDivergence as ModelDivergence
from keras_nrs.flatness.divergence import model_divergence as model_divergence
from keras_nrs.flatness.eigenvalues import Eigenvalues as Eigenvalues
from keras_nrs.flatness.eigenvalues import hessian_eigenvalues as hessian_eigenvalues
from keras_nrs.flatness.interpolation import interpolate as interpolate
from keras_nrs.flatness.kfra import KFRAEigenvalue as KFRAEigenvalue
from keras_nrs.flatness.kfra import kfra_max_eigenvalue as kfra_max_eigenvalue
from keras_nrs.flatness.landscape import Landscape as Landscape
from keras_nrs.flatness.landscape import loss_landscape as loss_landscape
from keras_nrs.flatness.operator import HessianOperator as HessianOperator
from keras_nrs.flatness.operator import hessian_operator as hessian_operator
from keras_nrs.flatness.plots import draw_densities as draw_densities
from keras_nrs.flatness.plots import draw_landscapes as draw_landscapes
from keras_nrs.flatness.sharpness import Sharpness as Sharpness
from keras_nrs.flatness.sharpness import sharpness as sharpness
from keras_nrs.flatness.trace import Trace as Trace
from keras_nrs.flatness.trace import hessian_trace as hessian_trace
from keras_nrs.flatness.trajectory import Trajectory as Trajectory
from keras_nrs.flatness.trajectory import trajectory as trajectory
