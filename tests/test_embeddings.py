"""Perturbed tables of embeddings, of which only the rows that are read are drawn."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs import embeddings
from tests.support.matrix import rest
from tests.support.operation_counts import operations_on
from tests.support.replicas import devices

pytestmark = pytest.mark.not_torch  # It perturbs all rows.

ROWS, LENGTH, TOKENS = 50, 4, 3


@pytest.fixture(autouse=True)
def small_tables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MIN_SIZE", 1)


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, ROWS, (12, TOKENS)), rng.integers(0, 2, 12)


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    return model


def classifier() -> keras.Model:
    """It reads its table twice."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    table = layers.Embedding(ROWS, LENGTH)
    summed = layers.Add()([table(inputs), table(ROWS - 1 - inputs)])
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(summed))))


def language_model() -> keras.Model:
    """It reads its table once by rows, and once as a kernel; and it masks a token."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    table = layers.ReversibleEmbedding(ROWS, LENGTH, mask_zero=True)
    logits = table(layers.LSTM(LENGTH)(table(inputs)), reverse=True)
    return compiled(keras.Model(inputs, logits))


def trained(
    make: Callable[[], keras.Model], arguments: dict[str, Any], *, reads_all: bool
) -> tuple[list[np.ndarray], int]:
    """Weights after two epochs, and how often rows were looked up."""
    lookups = 0

    def decide(inputs: Any, table: Any) -> bool:
        nonlocal lookups
        lookups += 1
        return reads_all

    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "_reads_all", decide)
        model = keras_nrs.wrap(make(), **{"eps": 0.5, "seed": 1} | arguments)
        model.fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0)
    for layer in keras_nrs.unwrap(model).layers:
        assert "call" not in vars(layer)
    return model.get_weights(), lookups


def assert_trains_the_same(make: Callable[[], keras.Model], **arguments: Any) -> None:
    """By rows of its tables, as with whole ones."""
    by_rows, lookups = trained(make, arguments, reads_all=False)
    whole, _ = trained(make, arguments, reads_all=True)
    assert lookups > 0
    for a, b in zip(by_rows, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"perturbation": "filterwise"},
        *rest(
            {},
            {"perturbation": "elementwise"},
            {"perturbation": "layerwise"},
            {"scheme": "rpr"},
            {"antithetic": "same_samples"},
            {"memory_efficient": True},
            {"perturbations_per_replica": 2, "antithetic": True},
            {"perturbed_fraction": 0.5},
            {"interval": 2},
        ),
    ],
    ids=str,
)
def test_rows_train_as_whole_tables_do(arguments: dict[str, Any]) -> None:
    assert_trains_the_same(classifier, **arguments)


@pytest.mark.several_devices
def test_replicas_read_rows_too() -> None:
    with devices(2):
        assert_trains_the_same(classifier)


def test_a_tied_table_is_read_by_rows_and_whole() -> None:
    assert_trains_the_same(language_model)


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ({"perturbation": "filterwise"}, 0),
        # The norm of theta.
        *rest(pytest.param({"perturbation": "elementwise"}, 0), pytest.param({}, 1)),
    ],
)
def test_a_step_adds_one_scatter_to_what_plain_keras_does_with_a_table(
    arguments: dict[str, Any], more: int
) -> None:
    """All else is done with the rows that are read."""
    x, y = data()
    shape = ROWS, LENGTH
    plain = operations_on(shape, classifier(), x[:4], y[:4])
    wrapped = keras_nrs.wrap(classifier(), **arguments)
    ours = operations_on(shape, wrapped, x[:4], y[:4])
    if keras.config.backend() == "jax":
        # The two lookups of the plain pass make two gradients and their sum. Ours goes
        # on through two of the perturbed pass. The last sum is with zeros.
        added = Counter({"scatter-add": 2, "broadcast_in_dim": 1, "add": 1})
        added += Counter({"stop_gradient": 1, "square": more})
    else:
        # These two give the variable's own memory.
        added = Counter({"ReadVariableOp": 1, "StopGradient": 1, "Square": more})
    assert ours - plain == +added


class TwiceAsLarge(layers.Embedding):
    def call(self, inputs: Any) -> Any:
        return 2 * super().call(inputs)


@pytest.mark.parametrize("kind", ["subclass", "LoRA", "own call", "small"])
def test_other_tables_are_perturbed_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = (TwiceAsLarge if kind == "subclass" else layers.Embedding)(ROWS, LENGTH)
    model = keras.Sequential([keras.Input((TOKENS,), dtype="int32"), layer])
    assert len(embeddings.readers(model)) == (kind != "subclass")
    if kind == "LoRA":
        layer.enable_lora(2)
    if kind == "own call":
        layer.call = layer.call
    if kind == "small":
        monkeypatch.setattr(embeddings, "MIN_SIZE", ROWS * LENGTH + 1)
    assert not embeddings.readers(model)


def test_a_thread_finds_tables_while_another_looks_them_up() -> None:
    """Both must draw the same noise."""
    model = classifier()
    found = embeddings.readers(model)
    assert found
    with embeddings.looking_up_rows([layer for of in found.values() for layer in of]):
        assert embeddings.readers(model) == found


def test_a_batch_with_as_many_tokens_as_rows_reads_whole_tables() -> None:
    table = keras.ops.zeros((6, 2))
    assert embeddings._reads_all(keras.ops.zeros((2, 3)), table)
    assert not embeddings._reads_all(keras.ops.zeros((5,)), table)
    assert not embeddings._reads_all(keras.KerasTensor((None, 3)), table)


def test_tokens_that_count_from_the_end() -> None:
    """JAX and NumPy read them so; TensorFlow has no such rows."""
    if keras.config.backend() != "jax":
        with pytest.raises(Exception, match="not in"):
            keras.ops.convert_to_numpy(embeddings.take_rows(np.eye(3), [-1])[0])
        return
    outputs = []
    for tokens in (np.array([[-1, 2]]), np.array([[ROWS - 1, 2]])):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,), dtype="int32")])
        model.add(layers.Embedding(ROWS, LENGTH))
        model.add(layers.Flatten())
        model.add(layers.Dense(2))
        model = keras_nrs.wrap(compiled(model), seed=0)
        model.fit(tokens, np.array([1]), verbose=0)
        outputs.append(model.get_weights()[0])
    np.testing.assert_array_equal(*outputs)


@pytest.mark.only_tensorflow
def test_ragged_tokens() -> None:
    import tensorflow as tf

    class Mean(layers.Layer):
        def call(self, inputs: Any) -> Any:
            return tf.reduce_mean(inputs, axis=1)

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape[0], input_shape[2]

    model = keras.Sequential([keras.Input((None,), dtype="int32", ragged=True)])
    for layer in (layers.Embedding(ROWS, LENGTH), Mean(), layers.Dense(2)):
        model.add(layer)
    model = keras_nrs.wrap(compiled(model), seed=0)
    tokens = tf.ragged.constant([[1, 2], [3], [4, 5, 6], [7]])
    samples = tf.data.Dataset.from_tensor_slices((tokens, [0, 1, 0, 1]))
    history = model.fit(samples.batch(2), shuffle=False, verbose=0).history
    assert history["model_divergence"][0] > 0
