"""The paper's networks."""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import models
from tests.support.matrix import rest

SMALL = (8, 8, 3)
# Shapes, initializers and penalties are Keras's, the same on each backend. PyTorch has
# nothing to compile for them.
any_backend = pytest.mark.only_torch


def num_trainable(model: keras.Model) -> int:
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# Published counts for 10 and 100 classes: of VGG16 (13 convolutions with biases and
# BatchNorm, dense layers of 512 and of the classes), ResNet18 and PyramidNet those of
# the usual PyTorch implementations; WideResNet's paper says 36.5 million, PyramidNet's
# 27.0 and 1.7 million.
@any_backend
@pytest.mark.parametrize(
    ("make", "with_10", "with_100"),
    [
        (models.vgg16, 14_991_946, 15_038_116),
        # By hand: 13 convolutions with biases, and dense layers of 512, 4,096 and 4,096
        # inputs.
        (partial(models.vgg16, batch_norm=False), 33_638_218, 34_006_948),
        (models.resnet18, 11_173_962, 11_220_132),
        (models.wide_resnet, 36_479_194, 36_536_884),
        (models.pyramidnet, 27_216_021, 27_319_071),
    ],
)
def test_trainable_parameters_are_those_published(
    make: Any, with_10: int, with_100: int
) -> None:
    assert num_trainable(make()) == with_10
    assert num_trainable(make(num_classes=100)) == with_100


@any_backend
def test_the_released_vgg16() -> None:
    model = models.vgg16(batch_norm=False)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds.count("Conv2D") == 13
    assert "BatchNormalization" not in kinds
    assert kinds[-6:] == ["Flatten", *(2 * ["Dense", "Dropout"]), "Dense"]
    assert kinds.count("Dropout") == 2
    for kernel in kernels(model)[-3:]:
        # Uniform from -1 / sqrt(units) to 1 / sqrt(units), as in the released code.
        bound = kernel.shape[1] ** -0.5
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.01)


@any_backend
def test_small_pyramidnet_is_as_large_as_published() -> None:
    model = models.pyramidnet(depth=20, widening=48)
    # By hand: each block has convolutions of 1, 9 and 1 pixels, and 4 BatchNorms.
    inputs, expected = 16, 3 * 3 * 3 * 16 + 2 * 16
    for filters in (24, 32, 40, 48, 56, 64):
        convolutions = inputs * filters + 9 * filters**2 + filters * 4 * filters
        expected += convolutions + 2 * (inputs + filters + filters + 4 * filters)
        inputs = 4 * filters
    expected += 2 * inputs + inputs * 10 + 10
    assert num_trainable(model) == expected


# For images of 224 x 224, patches of 16 x 16 and 1,000 classes, as published.
@any_backend
@pytest.mark.parametrize(
    ("size", "expected"), [("ti", 5_717_416), ("s", 22_050_664), ("b", 86_567_656)]
)
def test_vit_is_the_published_network(size: str, expected: int) -> None:
    model = models.vit((224, 224, 3), 1000, size=size, patch_size=16)
    assert num_trainable(model) == expected


# Those of PyTorch's torchvision, which has no biases before BatchNorm in ResNets.
@any_backend
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (models.imagenet_vgg16, 138_357_544),
        (models.imagenet_resnet50, 25_557_032),
        (models.imagenet_resnet101, 44_549_160),
    ],
)
def test_imagenet_networks_are_the_published_ones(make: Any, expected: int) -> None:
    model = make()
    biases = [
        v
        for v in model.trainable_variables
        if "resnet" in model.name and "conv" in v.path and v.path.endswith("bias")
    ]
    assert num_trainable(model) - sum(v.shape[0] for v in biases) == expected


SMALL_NETWORKS = {
    "vgg16": partial(models.vgg16, SMALL),
    "resnet18": partial(models.resnet18, SMALL),
    "wide_resnet": partial(models.wide_resnet, SMALL, depth=10, width=1, dropout=0.1),
    "pyramidnet": partial(models.pyramidnet, SMALL, depth=11, widening=6),
    "vit": partial(models.vit, SMALL, depth=1, dropout=0.1),
    "imagenet_resnet50": partial(models.imagenet_resnet50, (32, 32, 3)),
}


@pytest.mark.parametrize("name", [pytest.param("pyramidnet", marks=any_backend), "vit"])
def test_networks_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = SMALL_NETWORKS[name](num_classes=3)
    x = np.random.default_rng(0).normal(size=(2, *SMALL)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    [
        # JAX and TensorFlow compile each for up to half a minute.
        "wide_resnet",
        *rest(*(name for name in SMALL_NETWORKS if name != "wide_resnet")),
    ],
)
def test_logits_are_float32_and_a_step_of_nrs_trains(name: str) -> None:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = SMALL_NETWORKS[name](num_classes=3)
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.output.dtype == "float32"
    assert model.output.shape == (None, 3)
    if name == "imagenet_resnet50":
        return  # Its step is compiled for a minute: see `test_a_step_of_each_network`.
    take_a_step(model)


def take_a_step(model: keras.Model) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, model.output_shape[1], 2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    wrapped = keras_nrs.wrap(model, 0.1, perturbation="relative", seed=0)
    logs = wrapped.train_on_batch(x, y, return_dict=True)
    assert np.isfinite(logs["loss"])
    # Up to rounding: that of logits which are nearly equal.
    assert logs["model_divergence"] >= -1e-6
    after = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        models.vgg16,
        models.resnet18,
        models.wide_resnet,
        models.pyramidnet,
        partial(models.pyramidnet, widening=48),
        partial(models.vit, size="ti"),
        partial(models.vit, size="s"),
        partial(models.vit, size="b"),
        models.imagenet_vgg16,
        models.imagenet_resnet50,
        models.imagenet_resnet101,
    ],
    ids=lambda make: f"{getattr(make, '__name__', make)}",
)
def test_a_step_of_each_network(make: Any) -> None:
    take_a_step(make())


def kernels(model: keras.Model) -> list[np.ndarray]:
    names = [v for v in model.trainable_variables if v.name == "kernel"]
    return [keras.ops.convert_to_numpy(v) for v in names]


@any_backend
@pytest.mark.parametrize(
    ("make", "fans"),
    [
        (partial(models.resnet18, SMALL), "in"),
        (partial(models.wide_resnet, SMALL, depth=16, width=8), "out"),
        (partial(models.imagenet_resnet50, (32, 32, 3), 10), "in"),
    ],
    ids=["resnet18", "wide_resnet", "imagenet_resnet50"],
)
def test_convolutions_are_initialized_as_published(make: Any, fans: str) -> None:
    for kernel in kernels(make()):
        if kernel.ndim == 4 and kernel.size > 30_000:
            fan = np.prod(kernel.shape[:2]) * kernel.shape[2 if fans == "in" else 3]
            # The standard error of the standard deviation is below 0.5 %.
            assert kernel.std() == pytest.approx(np.sqrt(2 / fan), rel=0.025)
            # A normal distribution, which is not truncated.
            assert np.abs(kernel).max() > 3.5 * kernel.std()


@any_backend
def test_attention_is_initialized_as_a_matrix() -> None:
    model = models.vit(SMALL, 10, depth=1)
    bound = np.sqrt(6 / (192 + 192))
    for kernel in kernels(model):
        if kernel.ndim == 3:
            assert 0.99 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
    assert not kernels(model)[-1].any()


@any_backend
def test_layers_of_equal_shape_have_different_weights() -> None:
    shapes: dict[Any, list[np.ndarray]] = {}
    for kernel in kernels(models.resnet18(SMALL)):
        shapes.setdefault(kernel.shape, []).append(kernel)
    same = max(shapes.values(), key=len)
    assert len({kernel.tobytes() for kernel in same}) == len(same) > 2


@pytest.mark.matrix
def test_l2_is_half_the_decay_times_the_squared_norm_of_kernels() -> None:
    model = models.wide_resnet(SMALL, 3, depth=10, width=1)
    penalized = models.with_l2(model, 0.02)
    assert not model.losses
    expected = 0.01 * sum(np.sum(k.astype("f8") ** 2) for k in kernels(penalized))
    total = keras.ops.convert_to_numpy(sum(penalized.losses))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@any_backend
@pytest.mark.parametrize("name", ["vgg16", "wide_resnet", "vit"])
def test_l2_of_all_weights(name: str, tmp_path: Path) -> None:
    model = models.with_l2(SMALL_NETWORKS[name](num_classes=3), 0.02, all_weights=True)
    model.save(tmp_path / "model.keras")
    for penalized in (model, keras.saving.load_model(tmp_path / "model.keras")):
        weights = map(keras.ops.convert_to_numpy, penalized.trainable_variables)
        expected = 0.01 * sum(np.sum(w.astype("f8") ** 2) for w in weights)
        total = keras.ops.convert_to_numpy(sum(penalized.losses))
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert len(penalized.losses) == len(penalized.trainable_variables)


@any_backend
def test_l2_is_for_attention_and_not_for_models_in_models() -> None:
    model = models.vit(SMALL, 3, depth=1)
    assert len(models.with_l2(model, 0.1).losses) == len(kernels(model)) == 8
    outer = keras.Sequential([keras.Input(SMALL), model])
    with pytest.raises(ValueError, match="a model with 'vit_ti_4' among"):
        models.with_l2(outer, 0.1)


class Block(keras.layers.Layer):  # type: ignore[misc]
    """A layer around another one, to which no argument of it leads."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)


@any_backend
def test_l2_reaches_recurrent_kernels() -> None:
    model = keras.Sequential([keras.Input((3, 4)), keras.layers.LSTM(2)])
    penalized = models.with_l2(model, 0.02)
    weights = map(keras.ops.convert_to_numpy, penalized.trainable_variables[:2])
    expected = 0.01 * sum(np.sum(w.astype("f8") ** 2) for w in weights)
    total = keras.ops.convert_to_numpy(sum(penalized.losses))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@any_backend
@pytest.mark.parametrize(
    ("layer", "all_weights", "missed"),
    [
        (keras.layers.TimeDistributed(keras.layers.Dense(2)), False, "kernel"),
        (keras.layers.Bidirectional(keras.layers.GRU(2)), False, "recurrent_kernel"),
        (keras.layers.RNN(keras.layers.LSTMCell(2)), False, "kernel"),
        (Block(), False, "dense/kernel"),
        (keras.layers.RMSNormalization(), True, "scale"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_l2_is_never_left_out_silently(
    layer: keras.Layer, all_weights: bool, missed: str
) -> None:
    model = keras.Sequential([keras.Input((3, 4)), layer])
    with pytest.raises(ValueError, match=rf"weights \[.*{missed}'.*no argument"):
        models.with_l2(model, 0.1, all_weights=all_weights)


@any_backend
def test_channels_first_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks would be built, with pixels taken for channels."""
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    for make in SMALL_NETWORKS.values():
        with pytest.raises(ValueError, match=r"'channels_first'.*'channels_last'"):
            make(num_classes=3)


@any_backend
def test_integers_of_numpy_are_integers() -> None:
    arguments = {"size": np.array([8, 2]), "patch_size": np.int64(4)}
    model = models.vit(SMALL, np.int64(3), depth=np.int64(1), **arguments)
    assert model.output_shape == (None, 3)
    model = models.imagenet_resnet50((32, 32, 3), np.int64(3))
    assert model.output_shape == (None, 3)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(models.resnet18, (32, 32)), r"`input_shape`.*\(32, 32\)"),
        (partial(models.vit, (30, 32, 3)), "multiples of 4"),
        (partial(models.vit, size="l"), "`size` must be one of"),
        (partial(models.vit, size=(48, 5)), "`size` must be one of"),
        (partial(models.vit, size=(48.0, 3)), "`size` must be one of"),
        (partial(models.wide_resnet, depth=20), "`depth`.*depth=20"),
        (partial(models.pyramidnet, depth=100), "`depth`.*depth=100"),
        (partial(models.vgg16, num_classes=1), "`num_classes`.*num_classes=1"),
        (partial(models.imagenet_vgg16, (16, 16, 3)), ">= 32"),
    ],
)
def test_bad_arguments_are_named(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
