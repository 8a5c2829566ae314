"""VGG16 for small images."""

import keras
from keras import layers

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_rate
from keras_nrs.models.layers import HE_FAN_OUT
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import batch_norm_relu
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits

# From -1 / sqrt(units) to 1 / sqrt(units), as in the released code.
_UNIFORM = keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform")
# Filters of the convolutions between two poolings.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(
    input_shape: Shape = (32, 32, 3),
    num_classes: int = 10,
    *,
    dropout: float = 0.5,
    batch_norm: bool = True,
) -> keras.Model:
    """VGG16 with BatchNorm and dropout: 15.0 million parameters for 10 classes.

    The usual form for images of 32 x 32: the 13 convolutions of VGG16, a dense layer of
    512 units, and a dense layer of the classes. The authors' released code has no
    BatchNorm, and two dense layers of 4,096 units: 33.6 million parameters.

    Args:
        input_shape: Height, width and channels. Height and width are best multiples of
            32, or smaller powers of 2: a pooling leaves out the last row or column of
            an odd side. There is none where a side is 1.
        num_classes: Number of logits, >= 2.
        dropout: Rate before each dense layer. As published, the rate is 4 / 5 of it
            between the convolutions of a block, and 3 / 5 of it in the first block.
            Without BatchNorm, the rate after each of the two dense layers, and no other
            dropout.
        batch_norm: Whether the network is the usual one, or that of the released code.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        Simonyan and Zisserman (2015), https://arxiv.org/abs/1409.1556; BatchNorm and
        dropout as in Zagoruyko (2015), http://torch.ch/blog/2015/07/30/cifar.html
    """
    check_rate("dropout", dropout)
    check_bool("batch_norm", batch_norm)
    inputs = x = image_input(input_shape, num_classes)
    for filters in _BLOCKS:
        for i, width in enumerate(filters):
            x = layers.Conv2D(
                width, 3, padding="same", kernel_initializer=HE_FAN_OUT.clone()
            )(x)
            x = batch_norm_relu(x) if batch_norm else layers.ReLU()(x)
            is_last = i == len(filters) - 1
            if batch_norm and not is_last:
                x = layers.Dropout(dropout * (0.6 if width == 64 else 0.8))(x)
        if min(x.shape[1:3]) > 1:
            x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    if not batch_norm:
        for _ in range(2):
            x = layers.Dense(4096, "relu", kernel_initializer=_UNIFORM.clone())(x)
            x = layers.Dropout(dropout)(x)
        outputs = logits(x, num_classes, kernel_initializer=_UNIFORM.clone())
        return keras.Model(inputs, outputs, name="vgg16")
    x = layers.Dropout(dropout)(x)
    x = layers.Dropout(dropout)(batch_norm_relu(layers.Dense(512)(x)))
    return keras.Model(inputs, logits(x, num_classes), name="vgg16")
