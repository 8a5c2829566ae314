"""The axes of each variable along which its output units lie."""

import math
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


def is_kernel(variable: Any) -> bool:
    """Whether a variable is neither a bias nor a normalization's scale or offset.

    Kernels have two or more axes, and a name that is not one of a bias or a scale.
    Embeddings and factors of LoRA are kernels too.
    """
    return len(variable.shape) > 1 and not variable.name.endswith(_BIASES_AND_SCALES)


def unowned_axes(weight: Any) -> Axes:
    """The axes of a weight that no known layer owns, by its name if it has one.

    Args:
        weight: A `keras.Variable`, or a tensor, which is taken for a kernel.
    """
    name = weight.name if isinstance(weight, keras.Variable) else ""
    last = len(weight.shape) - 1
    if last < 1 or name.endswith(_BIASES_AND_SCALES):
        return ()
    if name.startswith("lora_"):
        return (last,)
    if name.endswith("embeddings") and name != "reverse_embeddings":
        return (0,)
    if name == "depthwise_kernel":
        return last - 1, last
    if name.endswith("kernel") or weight.shape[last] < math.prod(weight.shape):
        return (last,)
    return ()


def _axes_of(variable: Any, owner: Any) -> Axes:
    if isinstance(owner, keras.layers.TorchModuleWrapper):
        return _axes_in_torch(variable, owner.module)
    if not is_kernel(variable) or variable.name.startswith("lora_"):
        return unowned_axes(variable)
    last = len(variable.shape) - 1
    if isinstance(owner, _DEPTHWISE):
        return last - 1, last
    if isinstance(owner, _TRANSPOSED):
        return (last - 1,)
    if isinstance(owner, keras.layers.EinsumDense):
        inputs, output = owner.equation.split("->")
        letters = inputs.split(",")[1].strip()
        return tuple(i for i, letter in enumerate(letters) if letter in output)
    return unowned_axes(variable)


def _axes_in_torch(variable: Any, module: Any) -> Axes:
    """The axes of a parameter of a `torch.nn.Module`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter is variable.value:
                # Weights of normalization have the shape of what they normalize.
                is_scale = hasattr(part, "normalized_shape") or "bias" in name
                if parameter.ndim < 2 or is_scale:
                    return ()
                return (int(type(part).__name__.startswith("ConvTranspose")),)
    return unowned_axes(variable)
