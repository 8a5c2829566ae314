"""Networks for images of 224 x 224, from `keras.applications`."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from keras_nrs._checks import check_rate
from keras_nrs.models.layers import HE_FAN_IN
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import has_kernel
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits
from keras_nrs.models.layers import with_config

_SMALLEST_SIDE = 32


def _check_arguments(input_shape: Shape, num_classes: int) -> None:
    image_input(input_shape, num_classes)
    if min(input_shape[:2]) < _SMALLEST_SIDE:
        raise ValueError(
            f"The height and width in `input_shape` must be >= {_SMALLEST_SIDE} for "
            f"this network. Received: input_shape={input_shape!r}."
        )


def _resnet(
    application: Callable[..., keras.Model], input_shape: Shape, num_classes: int
) -> keras.Model:
    _check_arguments(input_shape, num_classes)
    model = application(
        weights=None,
        input_shape=tuple(input_shape),
        classes=int(num_classes),
        classifier_activation=None,
    )
    last_layer = model.layers[-1]

    def changes(layer: keras.Layer) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        if has_kernel(layer):
            changed["kernel_initializer"] = HE_FAN_IN
        if layer is last_layer:
            # Logits in float32 under every dtype policy, as in the other networks.
            changed["dtype"] = "float32"
        return changed

    return with_config(model, changes)


def imagenet_vgg16(
    input_shape: Shape = (224, 224, 3), num_classes: int = 1000, *, dropout: float = 0.5
) -> keras.Model:
    """VGG16 for ImageNet, without BatchNorm: 138.4 million parameters.

    Initialized by Glorot and Bengio's procedure, which the paper calls sufficient.

    Args:
        input_shape: Height, width and channels. Height and width are >= 32.
        num_classes: Number of logits, >= 2.
        dropout: Rate after the two dense layers of 4,096 units.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        Simonyan and Zisserman (2015), https://arxiv.org/abs/1409.1556
    """
    _check_arguments(input_shape, num_classes)
    check_rate("dropout", dropout)
    # The paper's network has dropout, and that of `keras.applications` has not.
    convolutions = keras.applications.VGG16(
        include_top=False, weights=None, input_shape=tuple(input_shape)
    )
    x = layers.Flatten(name="flatten")(convolutions.output)
    for name in ("fc1", "fc2"):
        x = layers.Dense(4096, "relu", name=name)(x)
        x = layers.Dropout(dropout)(x)
    return keras.Model(convolutions.input, logits(x, num_classes), name="vgg16")


def imagenet_resnet50(
    input_shape: Shape = (224, 224, 3), num_classes: int = 1000
) -> keras.Model:
    """ResNet50 for ImageNet: 25.6 million parameters. See `imagenet_vgg16`.

    References:
        He et al. (2016), https://arxiv.org/abs/1512.03385
    """
    return _resnet(keras.applications.ResNet50, input_shape, num_classes)


def imagenet_resnet101(
    input_shape: Shape = (224, 224, 3), num_classes: int = 1000
) -> keras.Model:
    """ResNet101 for ImageNet: 44.6 million parameters. See `imagenet_vgg16`.

    References:
        He et al. (2016), https://arxiv.org/abs/1512.03385
    """
    return _resnet(keras.applications.ResNet101, input_shape, num_classes)
