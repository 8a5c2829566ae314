"""Layers as the original papers configure them, and weight penalties."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import keras
from keras import layers

from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs.keras_internals import Functional

Tensor = Any
Shape = tuple[int, ...]

# Equation 10 of He et al. (2015), which keeps the variance of activations.
HE_FAN_IN = keras.initializers.VarianceScaling(2.0, "fan_in", "untruncated_normal")
# Their equation 14, which keeps the variance of gradients. Later networks use it.
HE_FAN_OUT = keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")

# Arguments of Keras's layers that take a kernel's penalty.
_KERNELS = {
    f"{name}_regularizer" for name in ("kernel", "depthwise", "pointwise", "recurrent")
}


def image_input(
    input_shape: Shape, num_classes: int, multiple_of: int = 1, name: str = "images"
) -> Tensor:
    """The input of a network, after a check of its first two arguments.

    Raises:
        TypeError, ValueError: if `input_shape` is not the shape of images with sides
            that are multiples of `multiple_of`, `num_classes` is below 2, or Keras is
            set to images with channels first.
    """
    check_int("num_classes", num_classes, minimum=2)
    data_format = keras.config.image_data_format()
    if data_format != "channels_last":
        raise ValueError(
            "The networks of keras_nrs.models take images with channels last. "
            f"Received: keras.config.image_data_format()={data_format!r}. Call "
            "keras.config.set_image_data_format('channels_last') first."
        )
    is_shape = isinstance(input_shape, tuple | list) and len(input_shape) == 3
    if not is_shape or not all(
        isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0
        for n in input_shape
    ):
        raise ValueError(
            "`input_shape` must be (height, width, channels), three integers >= 1. "
            f"Received: input_shape={input_shape!r}."
        )
    if any(side % multiple_of for side in input_shape[:2]):
        raise ValueError(
            f"The height and width in `input_shape` must be multiples of {multiple_of} "
            f"for this network. Received: input_shape={input_shape!r}. Resize or pad "
            "the images."
        )
    return keras.Input(tuple(map(int, input_shape)), name=name)


def conv(
    filters: int,
    kernel_size: int = 3,
    strides: int = 1,
    initializer: keras.Initializer = HE_FAN_OUT,
) -> layers.Conv2D:
    """A convolution without bias, because BatchNorm follows."""
    return layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer=initializer.clone(),
    )


def batch_norm() -> layers.BatchNormalization:
    """BatchNorm with the constants of the original networks' code."""
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)


def batch_norm_relu(x: Tensor) -> Tensor:
    """BatchNorm and a ReLU after it."""
    return layers.ReLU()(batch_norm()(x))


def logits(x: Tensor, num_classes: int, **arguments: Any) -> Tensor:
    """The last layer, in float32 under every dtype policy."""
    return layers.Dense(int(num_classes), dtype="float32", name="logits", **arguments)(
        x
    )


def with_l2(
    model: keras.Model, weight_decay: float, *, all_weights: bool = False
) -> keras.Model:
    """A new model with a loss `weight_decay / 2 * ||kernel||^2` for each kernel.

    With SGD this is the coupled weight decay of the paper's convolutional networks. The
    penalty counts once, at theta. It replaces penalties that the layers have.

    Args:
        model: A functional or sequential model, which stays as it is.
        weight_decay: Coefficient of the kernels in the gradient, >= 0.
        all_weights: Whether biases, embeddings, scales and shifts of normalization
            have the penalty, too, as in the authors' released code.

    Returns:
        A model of the same layers with new weights from the same initializers.

    Raises:
        TypeError, ValueError: if an argument is not as described, the model contains
            another model, or a layer has weights that no argument of it penalizes.

    Example:
        >>> import keras
        >>> from keras_nrs import models
        >>> model = models.with_l2(models.resnet18((8, 8, 1), 2), 5e-4)
        >>> model.get_layer("logits").kernel_regularizer.get_config()
        {'l2': 0.00025}
    """
    if not isinstance(model, keras.Sequential | Functional):
        raise TypeError(
            "`model` must be a functional or sequential model. Received: model="
            f"{model!r} of type {type(model).__name__}. Pass keras_nrs.unwrap(model) "
            "if it is wrapped."
        )
    penalty = keras.regularizers.L2(check_nonnegative("weight_decay", weight_decay) / 2)

    def changes(layer: keras.Layer) -> dict[str, Any]:
        if isinstance(layer, keras.Model):
            raise ValueError(
                "`model` must not contain another model. Received: a model with "
                f"{layer.name!r} among its layers. Build both from the same inputs."
            )
        arguments = {n for n in layer.get_config() if n.endswith("_regularizer")}
        chosen = arguments - {"activity_regularizer"} if all_weights else _KERNELS
        return dict.fromkeys(arguments & chosen, penalty)

    penalized = with_config(model, changes)
    missed = [
        variable.path
        for variable in penalized.trainable_variables
        if (all_weights or variable.name.endswith("kernel"))
        and getattr(variable, "regularizer", None) is None
    ]
    if missed:
        raise ValueError(
            "`model` must have layers whose own arguments penalize their weights, such "
            f"as `kernel_regularizer`. Received: a model named {model.name!r} with the "
            f"weights {missed[:9]}, which no argument reaches. Give the layers inside "
            "of TimeDistributed, Bidirectional or your own layers their penalties when "
            "you make them."
        )
    return penalized


def has_kernel(layer: keras.Layer) -> bool:
    """Whether this is a convolutional or a dense layer."""
    return isinstance(layer, layers.Conv2D | layers.Dense)


def with_config(
    model: keras.Model, changes: Callable[[keras.Layer], dict[str, Any]]
) -> keras.Model:
    """A new model whose layers have other arguments.

    Args:
        model: A functional or sequential model.
        changes: A function from a layer to the arguments that change.
    """

    def clone(layer: keras.Layer) -> keras.Layer:
        changed = {
            name: keras.saving.serialize_keras_object(value)
            for name, value in changes(layer).items()
        }
        return type(layer).from_config(layer.get_config() | changed)

    return keras.models.clone_model(model, clone_function=clone)
