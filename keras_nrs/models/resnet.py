"""ResNet18 for small images."""

import keras
from keras import layers

from keras_nrs.models.layers import HE_FAN_IN
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import Tensor
from keras_nrs.models.layers import batch_norm
from keras_nrs.models.layers import batch_norm_relu
from keras_nrs.models.layers import conv
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits


def _block(x: Tensor, filters: int, strides: int) -> Tensor:
    y = batch_norm_relu(conv(filters, 3, strides, HE_FAN_IN)(x))
    y = batch_norm()(conv(filters, 3, 1, HE_FAN_IN)(y))
    if strides > 1 or x.shape[-1] != filters:
        x = batch_norm()(conv(filters, 1, strides, HE_FAN_IN)(x))
    return layers.ReLU()(layers.add([x, y]))


def resnet18(input_shape: Shape = (32, 32, 3), num_classes: int = 10) -> keras.Model:
    """ResNet18 whose first convolution keeps the resolution: 11.2 million parameters.

    One convolution of 3 x 3 replaces the convolution of 7 x 7 with stride 2 and the
    pooling of the network for ImageNet. All else is the same.

    Args:
        input_shape: Height, width and channels.
        num_classes: Number of logits, >= 2.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        He et al. (2016), https://arxiv.org/abs/1512.03385
    """
    inputs = image_input(input_shape, num_classes)
    x = batch_norm_relu(conv(64, initializer=HE_FAN_IN)(inputs))
    for filters, strides in ((64, 1), (128, 2), (256, 2), (512, 2)):
        x = _block(x, filters, strides)
        x = _block(x, filters, 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, logits(x, num_classes), name="resnet18")
