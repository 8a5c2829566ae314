"""What scripts of keras.io do with a model, on wrapped ones.

Each script is as keras.io has it, only smaller, and has one line more: `wrap()`. Under
`scheme="baseline"` it must give what it gives without that line, to the bit.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

BACKEND = keras.config.backend()

Wrap = Callable[[keras.Model], Any]
SCRIPTS: dict[str, Callable[[Wrap, Path], list[Any]]] = {}


def script(function: Any) -> Any:
    SCRIPTS[function.__name__] = function
    return function


def fit(model: Any, **arguments: Any) -> list[float]:
    x, y = image_data()
    arguments = {"verbose": 0, "shuffle": False, "batch_size": 16} | arguments
    losses: list[float] = model.fit(x, y, **arguments).history["loss"]
    return losses


def functional_cnn() -> keras.Model:
    inputs = keras.Input((6, 6, 1))
    features = layers.Conv2D(4, 3, activation="relu", name="convolution")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(features)))
    compile_classifier(model)
    return model


@script
def freezing_all_but_the_last_layers(wrap: Wrap, path: Path) -> list[Any]:
    model = wrap(cnn())
    for layer in model.layers[:-1]:
        layer.trainable = False
    compile_classifier(model)
    before = model.layers[0].get_weights()[0]
    losses = fit(model)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], before)
    assert len(model.trainable_weights) == 2
    return [losses, len(model.layers), model.count_params(), model.layers[-1].name]


@script
def fine_tuning_in_two_stages(wrap: Wrap, path: Path) -> list[Any]:
    backbone = cnn(compile=False)
    inputs = keras.Input((6, 6, 1))
    outputs = layers.Dense(3)(backbone(inputs, training=False))
    model = wrap(keras.Model(inputs, outputs))
    inner = model.layers[1]
    inner.trainable = False
    compile_classifier(model)
    first = fit(model)
    inner.trainable = True
    compile_classifier(model, optimizer=keras.optimizers.Adam(1e-3))
    return [first, fit(model), len(model.trainable_weights)]


@script
def grad_cam(wrap: Wrap, path: Path) -> list[Any]:
    x, _ = image_data()
    model = wrap(functional_cnn())
    fit(model)
    last_convolution = model.get_layer("convolution")
    both = keras.Model(model.input, [last_convolution.output, model.output])
    activations, predictions = both(x[:1])
    return [activations, predictions]


@script
def feature_extraction(wrap: Wrap, path: Path) -> list[Any]:
    x, _ = image_data()
    model = wrap(functional_cnn())
    fit(model)
    features = keras.Model(model.input, [layer.output for layer in model.layers])
    shapes = [model.input_shape, model.output_shape]
    return [features(x[:2]), [list(shape[1:]) for shape in shapes]]


@script
def text_generation(wrap: Wrap, path: Path) -> list[Any]:
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=12,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = wrap(keras_hub.models.GPT2CausalLM(backbone, preprocessor=None))
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    tokens = np.arange(48).reshape(6, 8) % 12
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    model.fit(inputs, np.roll(tokens, -1, axis=1), verbose=0, shuffle=False)
    prompt = {
        "token_ids": np.array([[1, 2, 3, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0]]),
    }
    generated = model.generate(prompt, stop_token_ids=None)
    model.backbone.enable_lora(2)
    trainable = len(model.trainable_weights)
    return [generated["token_ids"], trainable, model.sampler.__class__.__name__]


@script
def searching_with_keras_tuner(wrap: Wrap, path: Path) -> list[Any]:
    import keras_tuner

    class HyperModel(keras_tuner.HyperModel):  # type: ignore[misc]
        def build(self, hp: Any) -> Any:
            keras.utils.set_random_seed(0)
            rate = hp.Choice("learning_rate", [0.01, 0.1])
            model = cnn(compile=False)
            compile_classifier(model, optimizer=keras.optimizers.SGD(rate))
            return wrap(model)

    x, y = image_data()
    tuner = keras_tuner.GridSearch(
        HyperModel(), "val_loss", directory=path, project_name="search"
    )
    tuner.search(x, y, validation_data=(x, y), epochs=2, verbose=0, shuffle=False)
    best = tuner.get_best_models()[0]
    rates = tuner.get_best_hyperparameters()[0].values
    return [best.evaluate(x, y, verbose=0), rates["learning_rate"]]


@script
def scikit_learn_classifier(wrap: Wrap, path: Path) -> list[Any]:
    x, y = image_data()

    def make(X: Any, y: Any) -> Any:  # noqa: N803
        model = keras.Sequential(
            [keras.Input(X.shape[1:]), layers.Dense(3, activation="softmax")]
        )
        model.compile("adam", loss="categorical_crossentropy")
        return wrap(model)

    flat = x.reshape(len(x), -1)
    fit_kwargs = {"epochs": 2, "verbose": 0, "shuffle": False}
    found = keras.wrappers.SKLearnClassifier(make, fit_kwargs=fit_kwargs).fit(flat, y)
    return [found.predict(flat), float(found.score(flat, y))]


@script
def embeddings_in_tensorboard(wrap: Wrap, path: Path) -> list[Any]:
    stack = [
        keras.Input((4,), dtype="int32"),
        layers.Embedding(5, 2, name="tokens"),
        layers.Flatten(),
        layers.Dense(3),
    ]
    model = keras.Sequential(stack)
    compile_classifier(model)
    tokens, labels = np.arange(64).reshape(16, 4) % 5, np.arange(16) % 3
    board = keras.callbacks.TensorBoard(
        path, histogram_freq=1, embeddings_freq=1, embeddings_metadata={"tokens": "m"}
    )
    model = wrap(model)
    model.fit(tokens, labels, callbacks=[board], verbose=0)
    events = b"".join(file.read_bytes() for file in sorted(path.glob("train/events*")))
    names = [b"graph_keras_model", b"tokens/embeddings/histogram", b"InputLayer"]
    return [(path / "projector_config.pbtxt").read_text(), [n in events for n in names]]


@script
def custom_metrics_in_a_loop(wrap: Wrap, path: Path) -> list[Any]:
    class Largest(keras.metrics.Metric):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.largest = self.add_weight(name="largest", initializer="zeros")

        def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
            largest = keras.ops.max(y_pred)
            self.largest.assign(keras.ops.maximum(self.largest, largest))

        def result(self) -> Any:
            return self.largest.value

    x, y = image_data()
    model = cnn(compile=False)
    compile_classifier(model, metrics=[Largest()])
    model = wrap(model)
    steps = [model.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in (0, 8)]
    alone = cnn(compile=False)
    compile_classifier(alone, metrics=None)
    scalar = wrap(alone).train_on_batch(x, y)
    return [steps, model.test_on_batch(x, y), model.metrics_names, np.ndim(scalar)]


@script
def export_for_serving(wrap: Wrap, path: Path) -> list[Any]:
    x, _ = image_data()
    model = wrap(cnn())
    fit(model)
    if BACKEND == "torch":
        import torch

        model.export(str(path / "model.pt2"), format="torch", verbose=False)
        program = torch.export.load(str(path / "model.pt2")).module()
        return [program(torch.as_tensor(x[:1]))]
    import tensorflow as tf

    model.export(str(path), verbose=False)
    served = tf.saved_model.load(str(path))
    return [served.serve(tf.constant(x[:1]))]


def values(results: list[Any]) -> list[Any]:
    """Texts, and arrays of NumPy."""
    flat = keras.tree.flatten(results)
    as_array = keras.ops.convert_to_numpy
    return [v if isinstance(v, str) else as_array(v) for v in flat]


@pytest.mark.matrix  # Each trains, and compiles, three times.
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_of_keras_io_works_as_without_the_line(
    name: str, tmp_path: Path
) -> None:
    def run(wrap: Wrap, folder: str) -> list[Any]:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        path = tmp_path / folder
        path.mkdir()
        return SCRIPTS[name](wrap, path)

    bare = run(lambda model: model, "bare")
    baseline = functools.partial(keras_nrs.wrap, scheme="baseline", seed=1)
    flat = [values(results) for results in (bare, run(baseline, "baseline"))]
    for expected, found in zip(*flat, strict=True):
        if isinstance(expected, str):
            assert found == expected
        else:
            assert_equal([found], [expected])
    regularized = values(run(keras_nrs.wrap, "nrs"))
    assert [np.shape(v) for v in regularized] == [np.shape(v) for v in flat[0]]
