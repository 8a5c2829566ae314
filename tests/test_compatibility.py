"""Networks that other packages make: they wrap and take a step."""

import warnings
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from tests import models


def take_a_step(model: keras.Model, x: np.ndarray, classes: int) -> None:
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    nrs = keras_nrs.wrap(model, eps=0.1, perturbation="relative", seed=0)
    (before,) = models.numpy_values(model.trainable_variables[:1])
    y = np.arange(len(x)) % classes
    logs = nrs.train_on_batch(x, y, return_dict=True)
    assert np.isfinite(float(logs["loss"]))
    # VGG16's outputs are uniform at first, up to rounding.
    assert float(logs["model_divergence"]) > -1e-6
    (after,) = models.numpy_values(model.trainable_variables[:1])
    assert not np.array_equal(before, after)


def test_keras_applications() -> None:
    model = keras.applications.MobileNet(
        weights=None, input_shape=(32, 32, 3), alpha=0.25, classes=5
    )
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    take_a_step(model, x, classes=5)


APPLICATIONS = [
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "ResNet50",
    "ResNet101",
    "ResNet50V2",
    "VGG16",
    "Xception",
]
if keras.config.backend() != "torch":  # where Keras itself refuses to build it
    APPLICATIONS.append("NASNetMobile")


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_more_of_keras_applications(name: str) -> None:
    make = getattr(keras.applications, name)
    size = 224 if name == "NASNetMobile" else 96
    model = make(weights=None, input_shape=(size, size, 3), classes=5)
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    take_a_step(model, x, classes=5)


@pytest.mark.only_jax
@pytest.mark.only_tensorflow  # KerasCV's layers fail on PyTorch.
def test_keras_cv_image_classifier() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # KerasCV's imports of old packages
        import keras_cv

        backbone = keras_cv.models.ViTDetBackbone(
            include_rescaling=True,
            input_shape=(32, 32, 3),
            patch_size=8,
            embed_dim=8,
            depth=1,
            mlp_dim=16,
            num_heads=2,
            out_chans=8,
            window_size=2,
            global_attention_indices=[0],
        )
        model = keras_cv.models.ImageClassifier(backbone=backbone, num_classes=4)
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("uint8")
    y = np.arange(8) % 4
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative", seed=0)
    history: dict[str, Any] = nrs.fit(x, y, batch_size=4, verbose=0).history
    assert history["model_divergence"][0] > 0


@pytest.mark.only_tensorflow  # KerasCV builds its legacy ViTs with TensorFlow ops.
def test_keras_cv_legacy_vit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from keras_cv.src.models.legacy.vit import ViTTiny16

        model = ViTTiny16(
            include_rescaling=True,
            include_top=True,
            num_classes=4,
            input_shape=(32, 32, 3),
        )
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    take_a_step(model, x, classes=4)
