"""KerasHub tasks, which preprocess in `fit()`."""

from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values

pytestmark = [
    pytest.mark.matrix,
    # Keras warns so of every KerasHub task, wrapped or not.
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
]


def vit_classifier() -> Any:
    """A tiny `ViTImageClassifier` that takes raw uint8 images of any size."""
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    converter = keras_hub.layers.ViTImageConverter(image_size=(16, 16), scale=1 / 255.0)
    preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(converter)
    model = keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=3, preprocessor=preprocessor
    )
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def raw_images(num: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num, 24, 24, 3)).astype("uint8")
    return images, rng.integers(0, 3, num)


def test_trains_on_raw_images_as_the_bare_task_does() -> None:
    x, y = raw_images()

    def train(scheme: str | None) -> tuple[list[np.ndarray], Any, Any]:
        keras.utils.set_random_seed(0)
        model = vit_classifier()
        trained = model if scheme is None else keras_nrs.wrap(model, scheme=scheme)
        history = trained.fit(
            x, y, batch_size=8, epochs=2, validation_split=0.25, verbose=0
        ).history
        assert trained.predict(x, verbose=0).shape == (24, 3)
        return numpy_values(model.variables), history, trained

    bare_values, bare_history, bare = train(None)
    values, history, nrs = train("baseline")
    assert_equal(values, bare_values)
    assert history == bare_history
    assert nrs.evaluate(x, y, verbose=0) == bare.evaluate(x, y, verbose=0)
    assert nrs.train_on_batch(x[:8], y[:8]) == bare.train_on_batch(x[:8], y[:8])
    assert nrs.test_on_batch(x[:8], y[:8]) == bare.test_on_batch(x[:8], y[:8])
    np.testing.assert_array_equal(nrs.predict_on_batch(x), bare.predict_on_batch(x))


def test_regularizes_a_task(tmp_path: Any) -> None:
    x, y = raw_images()
    nrs = keras_nrs.wrap(vit_classifier(), eps=0.3, perturbation="relative", seed=0)
    history = nrs.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    assert history["model_divergence"][-1] > 0
    eps = keras_nrs.calibrate_eps(nrs, x, target_divergence=0.01, num_samples=2)
    assert eps > 0


def test_options_reach_the_task() -> None:
    x, y = raw_images()
    class_weight = {0: 1.0, 1: 2.0, 2: 1.0}
    nrs = keras_nrs.wrap(vit_classifier(), eps=0.3, perturbation="relative")
    nrs.fit(x, y, class_weight=class_weight, verbose=0, steps_per_epoch=1)
    nrs.fit(x, y, sample_weight=np.ones(len(x)), verbose=0)
