"""Which models `wrap()` takes."""

import warnings
from typing import Any

import keras

from keras_nrs import keras_internals
from keras_nrs.forwarding import ForwardsToBase
from keras_nrs.perturbations import Perturbation

# What a model with a `train_step()` of its own needs in it.
_OWN_STEP = """\
    weights = self.trainable_variables
    deltas = keras_nrs.perturbations.RelativeBall().sample(weights, 0.2, seed)
    y_pred = self(x, training=True)
    y_pred_perturbed = ...  # The same call, with weights + deltas and the same masks.
    loss = keras_nrs.nrs_objective(y, y_pred, y_pred_perturbed, loss=self.loss).total"""


def check_calibration(calibrated_for: Any, perturbation: Perturbation) -> None:
    if calibrated_for is not None and type(calibrated_for) is not type(perturbation):
        names = type(calibrated_for).__name__, type(perturbation).__name__
        raise ValueError(
            "`eps` must belong to the perturbation. Received: an eps that "
            f"calibrate_eps() found for a {names[0]}, and perturbation={names[1]}. "
            "Pass the same perturbation to both, or float(eps) if you mean it."
        )


def check_layers(model: keras.Model) -> None:
    """Raise an error for weights that a forward pass reads past Keras's variables."""
    kinds = keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer
    for layer in keras_internals.sublayers(model, recursive=True):
        if isinstance(layer, kinds) and layer.trainable_variables:
            raise ValueError(
                "`model` must have layers of Keras wherever weights are trained. "
                f"Received: a model named {model.name!r} with the layer {layer.name!r} "
                f"of class {type(layer).__name__}, whose own weights cannot be "
                "perturbed. Set layer.trainable = False, rebuild it from layers of "
                "Keras, or use keras_nrs.nrs_objective in a loop of your own."
            )


def check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    if isinstance(model, ForwardsToBase):
        raise ValueError(
            f"`model` is wrapped already. Received: model={model.name!r}. Wrap "
            "keras_nrs.unwrap(model) to change the arguments."
        )
    name = type(model).__name__
    is_of_class = type(model).train_step is not keras.Model.train_step
    if is_of_class or "train_step" in vars(model):
        raise ValueError(
            "`model` must not override train_step(), which wrap() replaces. Received: "
            f"a model of class {name}. Take the loss of your own step from both "
            f"passes instead:\n\n{_OWN_STEP}\n\nhelp(keras_nrs.nrs_objective) has "
            "whole steps for each backend."
        )
    overrides_fit = type(model).fit is not keras.Model.fit
    if overrides_fit and not hasattr(model, "preprocess_samples"):
        warnings.warn(
            f"{name} overrides fit(). The wrapped model uses keras.Model.fit() "
            "instead.",
            stacklevel=4,
        )
