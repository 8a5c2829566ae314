"""The table of what works with what tells the truth."""

import keras
import numpy as np
import pytest

import keras_nrs
from tests.compatibility import table
from tests.compatibility.__main__ import PAGE
from tests.support.asserts import numpy_values
from tests.support.matrix import rest

# What no other test has.
QUICK = ["LoRA on int8 weights"]
# Networks that are compiled for up to half a minute, parts of others, and Python.
REST = [
    "Models within models, shared",
    "`clone_model()`",
    "`keras.applications` (MobileNet)",
    "KerasHub `ResNetImageClassifier`",
    "KerasCV `ImageClassifier` (ViTDet)",
    "KerasCV's legacy `ViTTiny16`",
    "LoRA",
]


def is_said_to_work(name: str) -> bool:
    (line,) = (
        line
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith(f"| {name} |")
    )
    cells = dict(zip(table.BACKENDS, line.split(" | ")[1:], strict=True))
    return cells[keras.config.backend()].startswith("yes")


# KerasHub and KerasCV import old packages; Keras quantizes not all layers.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *rest(*REST),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in table.CHECKS
            if name not in QUICK + REST
        ),
    ],
)
def test_as_the_table_says(name: str) -> None:
    found = table.examine(table.CHECKS[name])
    assert found.works == is_said_to_work(name), found.reason


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
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    nrs = keras_nrs.wrap(model, eps=0.1, perturbation="relative", seed=0)
    (before,) = numpy_values(model.trainable_variables[:1])
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    logs = nrs.train_on_batch(x, np.arange(2), return_dict=True)
    assert np.isfinite(float(logs["loss"]))
    # VGG16's outputs are uniform at first, up to rounding.
    assert float(logs["model_divergence"]) > -1e-6
    (after,) = numpy_values(model.trainable_variables[:1])
    assert not np.array_equal(before, after)
