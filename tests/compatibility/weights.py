"""Weights of other kinds: adapters, integers, lower precision."""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from tests.compatibility.way import Way
from tests.compatibility.way import dtype_policy
from tests.compatibility.way import unwrapped
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 10, (24, 6))
CLASSES = TOKENS[:, 0] % 3


def _text_model() -> Any:
    """An `Embedding`, an `EinsumDense` and a `Dense`."""
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(10, 8),
            layers.EinsumDense("abc,cd->abd", (None, 8), activation="tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, use_bias=False),
        ]
    )
    compile_classifier(model)
    return model


def _enable_lora(model: Any) -> None:
    for layer in model.layers:
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(2)
    assert all("lora" in v.path for v in model.trainable_variables)
    assert len(model.trainable_variables) == 6
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.1))


def _saved_and_loaded(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.keras"
        model.save(path)
        return keras.saving.load_model(path)


def lora(way: Way) -> None:
    """Enabled before a model is wrapped, and after it was fitted."""
    model = _text_model()
    _enable_lora(model)
    way.train(model, TOKENS, CLASSES)
    model = _text_model()
    trained = way.train(model, TOKENS, CLASSES)
    _enable_lora(model)
    way.fit(trained, TOKENS, CLASSES)
    outputs = way.predict(trained, TOKENS)
    # Keras adds the adapters to the kernels when it saves.
    loaded = _saved_and_loaded(trained)
    np.testing.assert_allclose(loaded.predict(TOKENS, verbose=0), outputs, rtol=1e-4)
    way.fit(loaded, TOKENS, CLASSES)


def int8_inference(way: Way) -> None:
    """Quantized before, after, and as a wrapped model."""
    for quantize in (
        lambda trained: trained.quantize("int8"),
        lambda trained: unwrapped(trained).quantize("int8"),
    ):
        trained = way.train(_text_model(), TOKENS, CLASSES)
        outputs = way.predict(trained, TOKENS)
        trained.evaluate(TOKENS, CLASSES, verbose=0)
        quantize(trained)
        quantized = way.predict(trained, TOKENS)
        # Scales differ by row, and activations are quantized too.
        assert 0 < np.abs(quantized - outputs).max() < 0.1 * np.abs(outputs).max()
        results = trained.evaluate(TOKENS, CLASSES, verbose=0)
        assert results == unwrapped(trained).evaluate(TOKENS, CLASSES, verbose=0)
        loaded = _saved_and_loaded(trained)
        np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), quantized)


def lora_on_int8(way: Way) -> None:
    model = _text_model()
    model.quantize("int8")
    _enable_lora(model)
    trained = way.train(model, TOKENS, CLASSES)
    outputs = way.predict(trained, TOKENS)
    # The kernels are quantized anew with the adapters in them.
    loaded = _saved_and_loaded(trained)
    found = loaded.predict(TOKENS, verbose=0)
    assert np.abs(found - outputs).max() < 0.1 * np.abs(outputs).max()


def mixed_bfloat16(way: Way) -> None:
    with dtype_policy("mixed_bfloat16"):
        trained = way.train(cnn(dropout=0.5), *image_data(32))
    assert trained.compute_dtype == "bfloat16"
    assert all(w.dtype == np.float32 for w in trained.get_weights())


def mixed_float16(way: Way) -> None:
    """Skips a step whose scaled gradient overflows, and halves the scale."""
    with dtype_policy("mixed_float16"):
        model = cnn()
        trained = way.train(model, *image_data(32))
        scaled = trained.optimizer
        assert isinstance(scaled, keras.optimizers.LossScaleOptimizer)
        scaled.dynamic_scale.assign(2.0**40)
        x, y = image_data(8)
        before = numpy_values(trained.trainable_variables)
        trained.train_on_batch(x, y)
        assert_equal(before, numpy_values(trained.trainable_variables))
        assert float(scaled.dynamic_scale) == 2.0**39
