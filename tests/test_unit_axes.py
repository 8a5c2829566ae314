"""Which axes of each layer's variables count its output units."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_nrs.unit_axes import is_kernel
from keras_nrs.unit_axes import unit_axes

IMAGES = (None, 8, 8, 4)
SEQUENCES = (None, 6, 4)
VIDEOS = (None, 4, 4, 4, 2)


class Own(layers.Layer):
    """Weights without a rule of their own."""

    def build(self, shape: Any) -> None:
        self.add_weight(shape=(4, 5), name="mixing")
        self.add_weight(shape=(1, 1, 4), name="token")
        self.add_weight(shape=(2, 4), name="my_bias")
        self.add_weight(shape=(9, 4), name="position_embeddings")
        self.add_weight(shape=(), name="temperature")
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs


def lora(layer: Any, shape: Any) -> Any:
    layer.build(shape)
    layer.enable_lora(2)
    return layer


CASES: dict[str, tuple[layers.Layer, Any, dict[str, tuple[int, ...]]]] = {
    "dense": (layers.Dense(3), (None, 1), {"kernel": (1,), "bias": ()}),
    "conv": (layers.Conv2D(3, 2), IMAGES, {"kernel": (3,), "bias": ()}),
    "transposed": (layers.Conv2DTranspose(3, 2), IMAGES, {"kernel": (2,), "bias": ()}),
    "transposed_1d": (layers.Conv1DTranspose(3, 2), SEQUENCES, {"kernel": (1,)}),
    "transposed_3d": (layers.Conv3DTranspose(3, 2), VIDEOS, {"kernel": (3,)}),
    "depthwise": (layers.DepthwiseConv2D(2), IMAGES, {"kernel": (2, 3)}),
    "depthwise_1d": (layers.DepthwiseConv1D(2), SEQUENCES, {"kernel": (1, 2)}),
    "separable": (
        layers.SeparableConv2D(3, 2),
        IMAGES,
        {"depthwise_kernel": (2, 3), "pointwise_kernel": (3,), "bias": ()},
    ),
    "lstm": (
        layers.LSTM(3),
        SEQUENCES,
        {"kernel": (1,), "recurrent_kernel": (1,), "bias": ()},
    ),
    "gru": (layers.GRU(3), SEQUENCES, {"recurrent_kernel": (1,), "bias": ()}),
    "conv_lstm": (
        layers.ConvLSTM1D(3, 2),
        (None, 3, 6, 4),
        {"kernel": (2,), "recurrent_kernel": (2,), "bias": ()},
    ),
    "embedding": (layers.Embedding(7, 3), (None, 5), {"embeddings": (0,)}),
    "reversible": (
        layers.ReversibleEmbedding(7, 3, tie_weights=False),
        (None, 5),
        {"embeddings": (0,), "reverse_embeddings": (1,)},
    ),
    "einsum": (
        layers.EinsumDense("...ab,bcd->...acd", (6, 2, 3), bias_axes="cd"),
        (None, 6, 4),
        {"kernel": (1, 2), "bias": ()},
    ),
    "einsum_sums_heads": (
        layers.EinsumDense("abcd,cde->abe", (6, 5)),
        (None, 6, 2, 4),
        {"kernel": (2,)},
    ),
    "einsum_of_scales": (
        layers.EinsumDense("abc,bc->abc", (6, 4)),
        SEQUENCES,
        {"kernel": (0, 1)},
    ),
    "lora_einsum": (
        lora(layers.EinsumDense("ab,bcd->acd", (2, 3)), (None, 4)),
        (None, 4),
        {"lora_kernel_a": (2,), "lora_kernel_b": (1,)},
    ),
    "lora_conv": (
        lora(layers.Conv2D(3, 2), IMAGES),
        IMAGES,
        {"lora_kernel_a": (3,), "lora_kernel_b": (1,), "bias": ()},
    ),
    "conv_3d": (layers.Conv3D(3, 2), VIDEOS, {"kernel": (4,), "bias": ()}),
    "separable_1d": (
        layers.SeparableConv1D(3, 2),
        SEQUENCES,
        {"depthwise_kernel": (1, 2), "pointwise_kernel": (2,), "bias": ()},
    ),
    "additive_attention": (
        layers.AdditiveAttention(),
        [(None, 6, 4), (None, 6, 4)],
        {"scale": ()},
    ),
    "rms_norm": (layers.RMSNormalization(axis=(1, 2)), SEQUENCES, {"scale": ()}),
    "time_distributed": (
        layers.TimeDistributed(layers.Conv2DTranspose(3, 2)),
        (None, 5, 8, 8, 4),
        {"kernel": (2,), "bias": ()},
    ),
    "norm": (
        layers.LayerNormalization(axis=(1, 2)),
        SEQUENCES,
        {"gamma": (), "beta": ()},
    ),
    "prelu": (layers.PReLU(), IMAGES, {"alpha": ()}),
    "lora": (
        lora(layers.Dense(3), (None, 4)),
        (None, 4),
        {"lora_kernel_a": (1,), "lora_kernel_b": (1,), "bias": ()},
    ),
    "lora_embedding": (
        lora(layers.Embedding(7, 3), (None, 5)),
        (None, 5),
        {"lora_embeddings_a": (1,), "lora_embeddings_b": (1,)},
    ),
    "bidirectional": (
        layers.Bidirectional(layers.SimpleRNN(3)),
        SEQUENCES,
        {"kernel": (1,), "recurrent_kernel": (1,), "bias": ()},
    ),
    "normalized": (
        layers.SpectralNormalization(layers.Conv2DTranspose(3, 2)),
        IMAGES,
        {"kernel": (2,)},
    ),
    "own": (
        Own(),
        SEQUENCES,
        {
            "mixing": (1,),
            "token": (),
            "my_bias": (),
            "position_embeddings": (0,),
            "temperature": (),
        },
    ),
}


@pytest.mark.only_torch
@pytest.mark.parametrize("name", CASES)
def test_axes_of_each_layer(name: str) -> None:
    layer, shape, expected = CASES[name]
    if not layer.built:
        layer.build(shape)
    found = unit_axes(layer)
    assert len(found) == len(layer.trainable_variables)
    by_name = {
        v.name: axes for v, axes in zip(layer.trainable_variables, found, strict=True)
    }
    assert expected.items() <= by_name.items()


@pytest.mark.only_torch
def test_attention_has_a_unit_for_each_channel_of_each_head() -> None:
    layer = layers.MultiHeadAttention(num_heads=2, key_dim=3)
    layer.build((None, 6, 4), (None, 6, 4))
    axes = {
        v.path.split("/")[-2] + "/" + v.name: a
        for v, a in zip(layer.trainable_variables, unit_axes(layer), strict=True)
    }
    # (channels, heads, key_dim), and (heads, key_dim, channels) at the end.
    assert axes["query/kernel"] == axes["value/kernel"] == (1, 2)
    assert axes["attention_output/kernel"] == (2,)
    assert axes["query/bias"] == axes["attention_output/bias"] == ()


@pytest.mark.only_torch
def test_grouped_attention_is_attention() -> None:
    layer = layers.GroupQueryAttention(3, 4, 2)
    layer.build((None, 6, 8), (None, 6, 8))
    kernels = [
        axes
        for v, axes in zip(layer.trainable_variables, unit_axes(layer), strict=True)
        if v.name == "kernel"
    ]
    # Query, key and value have heads and their channels, the output has channels.
    assert kernels == [(1, 2), (1, 2), (1, 2), (2,)]


@pytest.mark.only_torch
def test_a_tied_embedding_is_one_of_tokens() -> None:
    """Of the layer that embeds, though another layer computes outputs with it."""
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.ReversibleEmbedding(7, 3, tie_weights=True)
    model = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    assert unit_axes(model) == [(0,)]


@pytest.mark.only_torch
def test_a_tied_weight_has_the_axes_of_its_first_owner() -> None:
    class Sharing(layers.Layer):
        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.weight = weight

    first = layers.Conv2DTranspose(3, 2)
    first.build(IMAGES)
    second = Sharing(first.kernel)
    for order, expected in (([first, second], (2,)), ([second, first], (3,))):
        assert unit_axes(keras.Sequential(order))[0] == expected


@pytest.mark.only_torch
def test_torch_modules() -> None:
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 3, 2),
        torch.nn.ConvTranspose2d(3, 5, 2),
        torch.nn.LayerNorm((6, 6)),
        torch.nn.BatchNorm2d(5),
        torch.nn.Embedding(7, 4),
    )
    layer = keras.layers.TorchModuleWrapper(module)
    assert unit_axes(layer) == [(0,), (), (1,), (), (), (), (), (), (0,)]


@pytest.mark.only_torch
def test_biases_of_torch_modules_have_no_units() -> None:
    import torch

    module = torch.nn.MultiheadAttention(4, 2, add_bias_kv=True)
    layer = keras.layers.TorchModuleWrapper(module)
    axes = {
        name: unit_axes(layer)[i]
        for i, v in enumerate(layer.trainable_variables)
        for name, parameter in module.named_parameters()
        if parameter is v.value
    }
    assert axes["in_proj_weight"] == axes["out_proj.weight"] == (0,)
    assert axes["bias_k"] == axes["bias_v"] == axes["in_proj_bias"] == ()


@pytest.mark.only_torch
def test_kernels_by_name_and_rank() -> None:
    def named(name: str, shape: tuple[int, ...]) -> keras.Variable:
        return keras.Variable(np.ones(shape), name=name)

    kernels = [named("kernel", (2, 3)), named("embeddings", (4, 1)), named("w", (1, 1))]
    kernels += [named("lora_kernel_a", (2, 2)), named("bias_kernel", (2, 2))]
    assert all(map(is_kernel, kernels))
    others = [named("bias", (2, 3)), named("kernel", (3,)), named("my_scale", (2, 2))]
    others += [named("gamma", (2,)), named("temperature", ())]
    assert not any(map(is_kernel, others))


@pytest.mark.only_torch
def test_all_axes_are_of_their_variables() -> None:
    """In a network of many layers, in the order of its variables."""
    model = keras.applications.MobileNetV2((32, 32, 3), weights=None, classes=3)
    found = unit_axes(model)
    for variable, axes in zip(model.trainable_variables, found, strict=True):
        assert axes == tuple(sorted(set(axes)))
        units = np.prod([variable.shape[a] for a in axes])
        is_depthwise = "depthwise" in variable.path and len(variable.shape) == 4
        expected = variable.shape[2] if is_depthwise else variable.shape[-1]
        assert units == (expected if len(variable.shape) > 1 else 1)
