"""Vision transformers."""

import operator
from typing import Any
from typing import NamedTuple

import keras
from keras import initializers
from keras import layers
from keras import ops

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_rate
from keras_nrs.models.layers import Shape
from keras_nrs.models.layers import Tensor
from keras_nrs.models.layers import image_input
from keras_nrs.models.layers import logits


class _Size(NamedTuple):
    hidden: int
    heads: int


SIZES = {"ti": _Size(192, 3), "s": _Size(384, 6), "b": _Size(768, 12)}


@keras.saving.register_keras_serializable(package="keras_nrs")
class ClassTokenAndPositions(layers.Layer):  # type: ignore[misc]
    """Puts a learned token before a sequence and adds learned positions to it.

    Input shape: `(batch, length, hidden)`. Output shape: `(batch, length + 1, hidden)`.

    Args:
        embeddings_regularizer: Penalty on the token and on the positions.
        **arguments: Arguments of `keras.Layer`.
    """

    def __init__(self, embeddings_regularizer: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.embeddings_regularizer = keras.regularizers.get(embeddings_regularizer)

    def get_config(self) -> dict[str, Any]:
        penalty = keras.regularizers.serialize(self.embeddings_regularizer)
        return super().get_config() | {"embeddings_regularizer": penalty}

    def build(self, input_shape: Shape) -> None:
        _, length, hidden = input_shape
        self.class_token = self.add_weight(
            shape=(1, 1, hidden),
            initializer="zeros",
            regularizer=self.embeddings_regularizer,
            name="class_token",
        )
        self.positions = self.add_weight(
            shape=(1, length + 1, hidden),
            initializer=initializers.RandomNormal(stddev=0.02),
            regularizer=self.embeddings_regularizer,
            name="positions",
        )

    def call(self, patches: Tensor) -> Tensor:
        batch, _, hidden = ops.shape(patches)
        token = ops.broadcast_to(self.class_token, (batch, 1, hidden))
        return ops.concatenate([token, patches], axis=1) + self.positions

    def compute_output_shape(self, input_shape: Shape) -> Any:
        batch, length, hidden = input_shape
        return batch, length + 1, hidden


def _parse_size(size: Any) -> _Size:
    if isinstance(size, str):
        return SIZES[check_choice("size", size, SIZES)]
    try:
        hidden, heads = map(operator.index, size)
        is_allowed = 1 <= heads <= hidden and hidden % heads == 0
    except (TypeError, ValueError):
        is_allowed = False
    if not is_allowed:
        raise ValueError(
            f"`size` must be one of {', '.join(map(repr, SIZES))} or a pair (hidden "
            "units, heads), the first a multiple of the second, such as (48, 3). "
            f"Received: size={size!r}."
        )
    return _Size(hidden, heads)


def _layer_norm(x: Tensor) -> Tensor:
    return layers.LayerNormalization(epsilon=1e-6)(x)


def _attention(x: Tensor, heads: int, dropout: float) -> Tensor:
    hidden = x.shape[-1]
    # Glorot's bound for a matrix from `hidden` to `hidden`. Keras stores these matrices
    # in three dimensions, and would initialize them like the kernels of convolutions.
    bound = (6 / (hidden + hidden)) ** 0.5
    x = layers.MultiHeadAttention(
        heads,
        hidden // heads,
        dropout=dropout,
        kernel_initializer=initializers.RandomUniform(-bound, bound),
    )(x, x)
    return layers.Dropout(dropout)(x) if dropout else x


def _mlp(x: Tensor, dropout: float) -> Tensor:
    hidden = x.shape[-1]
    for units, activation in ((4 * hidden, "gelu"), (hidden, None)):
        bias = initializers.RandomNormal(stddev=1e-6)
        x = layers.Dense(units, activation, bias_initializer=bias)(x)
        if dropout:
            x = layers.Dropout(dropout)(x)
    return x


def vit(
    input_shape: Shape = (32, 32, 3),
    num_classes: int = 10,
    *,
    size: str | tuple[int, int] = "ti",
    patch_size: int = 4,
    depth: int = 12,
    dropout: float = 0.0,
) -> keras.Model:
    """Vision transformer with a class token: 5.4, 21.3 or 85.1 million parameters.

    Args:
        input_shape: Height, width and channels. Height and width are multiples of
            `patch_size`.
        num_classes: Number of logits, >= 2.
        size: `"ti"` (192 hidden units, 3 heads), `"s"` (384, 6) or `"b"` (768, 12), or
            a pair (hidden units, heads), the first a multiple of the second. The MLP of
            a block has 4 times as many units between its two layers.
        patch_size: Side of the square patches, in pixels.
        depth: Number of blocks, >= 1.
        dropout: Rate after the positions are added, after the attention and each dense
            layer of a block, and in the attention.

    Returns:
        A model of inputs `(batch, *input_shape)` and logits `(batch, num_classes)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    References:
        Dosovitskiy et al. (2021), https://arxiv.org/abs/2010.11929
    """
    hidden, heads = _parse_size(size)
    # An int, as Keras wants it, for an integer of NumPy.
    patch_size = check_int("patch_size", patch_size, minimum=1)
    check_int("depth", depth, minimum=1)
    check_rate("dropout", dropout)
    inputs = image_input(input_shape, num_classes, multiple_of=patch_size)
    patches = layers.Conv2D(
        hidden, patch_size, patch_size, kernel_initializer="lecun_normal"
    )(inputs)
    x = ClassTokenAndPositions()(layers.Reshape((-1, hidden))(patches))
    if dropout:
        x = layers.Dropout(dropout)(x)
    for _ in range(depth):
        x = layers.add([x, _attention(_layer_norm(x), heads, dropout)])
        x = layers.add([x, _mlp(_layer_norm(x), dropout)])
    class_token = _layer_norm(x)[:, 0]
    outputs = logits(class_token, num_classes, kernel_initializer="zeros")
    name = size if isinstance(size, str) else f"{hidden}_{heads}"
    return keras.Model(inputs, outputs, name=f"vit_{name}_{patch_size}")
