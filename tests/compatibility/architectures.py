"""Models of all kinds train, and predict as they do without NRS."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import layers

from tests.compatibility.way import Way
from tests.support.data import image_data
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier


def images(size: int, num: int = 16, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 256, (num, size, size, 3))
    return x.astype("uint8"), np.arange(num) % classes


def sequential(way: Way) -> None:
    way.train(cnn(dropout=0.5), *image_data(32))


def functional(way: Way) -> None:
    """Inputs in a dict with a list, outputs in a dict, and outputs in a list."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 24, 4)).astype("float32")
    y = {"kind": np.arange(24) % 3, "size": left[:, :1]}
    inputs = {
        "left": keras.Input((4,), name="left"),
        "right": [keras.Input((2,), name="first"), keras.Input((2,), name="second")],
    }
    hidden = layers.Concatenate()(keras.tree.flatten(inputs))
    outputs = {
        "kind": layers.Dense(3, name="kind", activation="softmax")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    x: Any = {"left": left, "right": [right[:, :2], right[:, 2:]]}
    model = keras.Model(inputs, outputs)
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile("sgd", losses, metrics={"kind": ["accuracy"]})
    way.train(model, x, y)
    model = keras.Model(keras.tree.flatten(inputs), list(outputs.values()))
    model.compile("sgd", list(losses.values()))
    way.train(model, keras.tree.flatten(x), list(y.values()))


def subclassed(way: Way) -> None:
    model = Subclassed()
    compile_classifier(model)
    trained = way.train(model, *image_data(32))
    way.fit(trained, *image_data(32))


def own_train_step(way: Way) -> None:
    class Own(Subclassed):
        def train_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().train_step(*args, **kwargs)

    model = Own()
    compile_classifier(model)
    way.train(model, *image_data(32))


def models_in_models(way: Way) -> None:
    """The same inner model twice, and one within that."""
    inner = keras.Sequential(
        [keras.Input((4,)), keras.Sequential([layers.Dense(4)]), layers.ReLU()]
    )
    inputs = keras.Input((6, 6, 1))
    hidden = layers.Dense(4)(layers.Flatten()(inputs))
    model = keras.Model(inputs, layers.Dense(3)(inner(inner(hidden))))
    compile_classifier(model)
    way.train(model, *image_data(32))


def keras_applications(way: Way) -> None:
    model = keras.applications.MobileNet(
        weights=None, input_shape=(32, 32, 3), alpha=0.25, classes=3
    )
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    x, y = images(32, 4)
    way.train(model, x / 255.0, y, epochs=1, batch_size=4)


def _keras_hub_image_classifier(way: Way, kind: str, backbone: Any) -> None:
    """A task with its preprocessor, on images of another size."""
    import keras_hub

    converter = getattr(keras_hub.layers, f"{kind}ImageConverter")
    preprocessor = getattr(keras_hub.models, f"{kind}ImageClassifierPreprocessor")
    model = getattr(keras_hub.models, f"{kind}ImageClassifier")(
        backbone=backbone,
        num_classes=3,
        preprocessor=preprocessor(converter(image_size=(16, 16), scale=1 / 255)),
    )
    way.train(model, *images(24))


def keras_hub_vit(way: Way) -> None:
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    _keras_hub_image_classifier(way, "ViT", backbone)


def keras_hub_resnet(way: Way) -> None:
    import keras_hub

    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    _keras_hub_image_classifier(way, "ResNet", backbone)


def text_classifier() -> tuple[Any, list[str], np.ndarray]:
    """A tiny BERT with a vocabulary of its own, texts and labels."""
    import keras_hub

    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words],
        lowercase=True,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone=keras_hub.models.BertBackbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=8,
            num_segments=1,
        ),
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
    )
    texts = ["The cat sat on the mat", "a dog ran under a tree"] * 8
    return model, texts, np.arange(16) % 2


def keras_hub_text_classifier(way: Way) -> None:
    model, texts, y = text_classifier()
    way.train(model, np.array(texts), y)


def keras_cv_image_classifier(way: Way) -> None:
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
        model = keras_cv.models.ImageClassifier(backbone=backbone, num_classes=3)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    way.train(model, *images(32, 8))


def keras_cv_legacy_vit(way: Way) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from keras_cv.src.models.legacy.vit import ViTTiny16

        model = ViTTiny16(
            include_rescaling=True,
            include_top=True,
            num_classes=3,
            input_shape=(32, 32, 3),
        )
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    x, y = images(32, 4)
    way.train(model, x.astype("float32"), y, epochs=1, batch_size=4)
