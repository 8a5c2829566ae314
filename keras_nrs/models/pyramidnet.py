"""Deep pyramidal residual networks."""

import keras
from keras import layers
from keras import ops

from keras_nrs._checks import check_int
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import Tensor
from keras_nrs.models.layers import batch_norm
from keras_nrs.models.layers import batch_norm_relu
from keras_nrs.models.layers import conv
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits

_EXPANSION = 4


def _block(x: Tensor, filters: int, strides: int) -> Tensor:
    y = conv(filters, 1)(batch_norm()(x))
    y = conv(filters, 3, strides)(batch_norm_relu(y))
    y = conv(filters * _EXPANSION, 1)(batch_norm_relu(y))
    y = batch_norm()(y)
    if strides > 1:
        x = layers.AveragePooling2D(strides, padding="same")(x)
    # The shortcut has no weights. Zeros fill its missing channels.
    missing = y.shape[-1] - x.shape[-1]
    return layers.add([y, ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))])


def pyramidnet(
    input_shape: Shape = (32, 32, 3),
    num_classes: int = 10,
    *,
    depth: int = 164,
    widening: int = 270,
) -> keras.Model:
    """PyramidNet, whose bottleneck blocks widen linearly: 27.2 million parameters.

    Args:
        input_shape: Height, width and channels.
        num_classes: Number of logits, >= 2.
        depth: Number of convolutions, 2 more than a multiple of 9.
        widening: Number of filters that all blocks together gain, >= 0. Table 1 has
            270; 48 makes a small network.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        Han, Kim and Kim (2017), https://arxiv.org/abs/1610.02915
    """
    check_int("depth", depth, minimum=11)
    check_int("widening", widening, minimum=0)
    if (depth - 2) % 9:
        raise ValueError(
            "`depth` must be 2 more than a multiple of 9, such as 11, 110 or 164. "
            f"Received: depth={depth}."
        )
    inputs = image_input(input_shape, num_classes)
    x = batch_norm()(conv(16)(inputs))
    blocks_per_stage = (depth - 2) // 9
    num_blocks = 3 * blocks_per_stage
    for i in range(num_blocks):
        is_first_of_stage = i > 0 and i % blocks_per_stage == 0
        filters = round(16 + widening * (i + 1) / num_blocks)
        x = _block(x, filters, strides=2 if is_first_of_stage else 1)
    x = layers.GlobalAveragePooling2D()(batch_norm_relu(x))
    name = f"pyramidnet_{depth}_{widening}"
    return keras.Model(inputs, logits(x, num_classes), name=name)
