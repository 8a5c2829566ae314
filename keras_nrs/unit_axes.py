"""The axes of each variable along which its output units lie."""

from typing import Any

import keras

from keras_nrs.keras_internals import sublayers

Axes = tuple[int, ...]

# How Keras's layers name what has no units, whatever its rank.
_BIASES_AND_SCALES = ("bias", "gamma", "beta", "alpha", "scale")
_DEPTHWISE = keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def unit_axes(model: Any) -> list[Axes]:
    """For each trainable variable, the axes along which its output units lie.

    An output unit, or filter, is the slice at one index of these axes: the weights that
    make one channel of the output. The layer that owns a variable decides:

    - kernels of dense, convolutional, pointwise and recurrent layers, and factors of
      LoRA: the last axis;
    - kernels of transposed convolutions: the axis before the last;
    - kernels of depthwise convolutions: the last two axes;
    - kernels of `EinsumDense`, which attention is made of: the axes whose letters are
      in the output;
    - embeddings: the first axis, a unit for each token; `reverse_embeddings`: the last;
    - parameters of `torch.nn`: the first axis, of transposed convolutions the second;
    - biases and scales, of any rank: none.

    A tied weight has the axes of the first layer that owns it. Weights of other layers
    follow the same rules if their names end in "kernel", "embeddings", "bias" and the
    like. Otherwise their units lie along the last axis, unless a unit is one weight.

    Args:
        model: A built model, which must not be wrapped.

    Returns:
        A tuple of axes, ascending, for each of `model.trainable_variables`. An empty
        tuple means that the variable is one unit.
    """
    owners: dict[int, Any] = {}
    for layer in [model, *sublayers(model, recursive=True)]:
        inner = {id(v) for sub in sublayers(layer) for v in sub.trainable_variables}
        for variable in layer.trainable_variables:
            if id(variable) not in inner:
                owners.setdefault(id(variable), layer)
    return [_axes_of(v, owners.get(id(v))) for v in model.trainable_variables]


def _axes_of(variable: Any, owner: Any) -> Axes:
    name, rank = variable.name, len(variable.shape)
    if rank < 2 or name.endswith(_BIASES_AND_SCALES):
        return ()
    if isinstance(owner, keras.layers.TorchModuleWrapper):
        return (1,) if _is_of_transposed_module(variable, owner.module) else (0,)
    if name.startswith("lora_") or name == "reverse_embeddings":
        return (rank - 1,)
    if name.endswith("embeddings"):
        return (0,)
    if name == "depthwise_kernel" or isinstance(owner, _DEPTHWISE):
        return rank - 2, rank - 1
    if isinstance(owner, _TRANSPOSED):
        return (rank - 2,)
    if isinstance(owner, keras.layers.EinsumDense):
        inputs, output = owner.equation.split("->")
        letters = inputs.split(",")[1].strip()
        return tuple(i for i, letter in enumerate(letters) if letter in output)
    if name.endswith("kernel") or variable.shape[-1] < keras.ops.size(variable):
        return (rank - 1,)
    return ()


def _is_of_transposed_module(variable: Any, module: Any) -> bool:
    """Whether a transposed convolution inside a module of PyTorch has a parameter."""
    return any(
        parameter is variable.value
        for part in module.modules()
        if type(part).__name__.startswith("ConvTranspose")
        for parameter in part.parameters(recurse=False)
    )
