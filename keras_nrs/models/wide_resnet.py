"""Wide residual networks."""

import keras
from keras import layers

from keras_nrs._checks import check_int
from keras_nrs._checks import check_rate
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import Tensor
from keras_nrs.models.layers import batch_norm_relu
from keras_nrs.models.layers import conv
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits


def _block(x: Tensor, filters: int, strides: int, dropout: float) -> Tensor:
    y = batch_norm_relu(x)
    changes_shape = strides > 1 or x.shape[-1] != filters
    shortcut = conv(filters, 1, strides)(y) if changes_shape else x
    y = batch_norm_relu(conv(filters, 3, strides)(y))
    if dropout:
        y = layers.Dropout(dropout)(y)
    return layers.add([shortcut, conv(filters)(y)])


def wide_resnet(
    input_shape: Shape = (32, 32, 3),
    num_classes: int = 10,
    *,
    depth: int = 28,
    width: int = 10,
    dropout: float = 0.0,
) -> keras.Model:
    """WideResNet-`depth`-`width`: 36.5 million parameters at 28 and 10.

    Args:
        input_shape: Height, width and channels.
        num_classes: Number of logits, >= 2.
        depth: Number of convolutions, 4 more than a multiple of 6.
        width: Factor of the filters, >= 1.
        dropout: Rate between the two convolutions of a block.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        Zagoruyko and Komodakis (2016), https://arxiv.org/abs/1605.07146
    """
    check_int("depth", depth, minimum=10)
    check_int("width", width, minimum=1)
    check_rate("dropout", dropout)
    if (depth - 4) % 6:
        raise ValueError(
            "`depth` must be 4 more than a multiple of 6, such as 10, 16, 28 or 40. "
            f"Received: depth={depth}."
        )
    inputs = image_input(input_shape, num_classes)
    x = conv(16)(inputs)
    for filters, first_strides in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 4) // 6):
            x = _block(x, filters * width, first_strides if i == 0 else 1, dropout)
    x = layers.GlobalAveragePooling2D()(batch_norm_relu(x))
    name = f"wide_resnet_{depth}_{width}"
    return keras.Model(inputs, logits(x, num_classes), name=name)
