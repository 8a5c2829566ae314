"""The gradients of TensorFlow's training step."""

import logging
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.asserts import numpy_values
from tests.support.matrix import rest
from tests.support.networks import compile_classifier
from tests.support.replicas import devices

pytestmark = pytest.mark.only_tensorflow

X, Y = np.arange(8, dtype="int32").reshape(2, 4), np.array([0, 1])


def text_classifier(**optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(8, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    name = optimizer.pop("name", "Adam")
    compile_classifier(
        model, optimizer=getattr(keras.optimizers, name)(0.1, **optimizer)
    )
    return model


def rows_after_a_step(model: keras.Model, trained: keras.Model) -> np.ndarray:
    """The embeddings of a model after one step of it or of its wrapped model."""
    trained.train_on_batch(X, Y)
    return numpy_values(model.trainable_variables)[0]


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"global_clipnorm": 1e-3},
        *rest({"clipvalue": 1e-3}, {"clipnorm": 1e-3}),
        *[
            pytest.param({"name": name}, marks=pytest.mark.slow)
            for name in ("AdamW", "RMSprop", "Adagrad", "Nadam", "Adadelta", "Muon")
        ],
    ],
    ids=lambda optimizer: " ".join(map(str, optimizer.values())) or "Adam",
)
def test_the_rows_of_both_passes_are_one_gradient(optimizer: dict[str, Any]) -> None:
    """With eps = 0 and `normalize` a step is plain Keras's, where rows move once."""
    plain, model = text_classifier(**optimizer), text_classifier(**optimizer)
    expected = rows_after_a_step(plain, plain)
    nrs = keras_nrs.wrap(model, eps=0.0, normalize=True)
    # Adam turns the rounding of gradients into a part of its step.
    np.testing.assert_allclose(rows_after_a_step(model, nrs), expected, atol=1e-5)


def test_an_error_on_one_replica_leaves_a_model_that_trains() -> None:
    """All replicas keep the same finite weights."""
    from tensorflow import control_dependencies
    from tensorflow import debugging
    from tensorflow import errors
    from tensorflow import identity

    class NoBadInput(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            message = "a bad input"
            check = debugging.assert_less(keras.ops.max(x), 100.0, message=message)
            # Otherwise the step would race with the error, and might end before it.
            with control_dependencies([check]):
                return identity(x)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)).astype("float32"), np.arange(32) % 3
    bad = x.copy()
    bad[25] = 1e6  # In the half of the second replica.
    with devices(2):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), NoBadInput(), layers.Dense(3)])
        compile_classifier(model)
        nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
        nrs.fit(x, y, batch_size=32, verbose=0)
        with pytest.raises(errors.InvalidArgumentError, match="a bad input"):
            nrs.fit(bad, y, batch_size=32, verbose=0, shuffle=False)
        history = nrs.fit(x, y, batch_size=32, epochs=20, verbose=0).history
        losses = history["loss"]
        assert losses[-1] < losses[0]
        for variable in model.trainable_variables:
            copies = [value.numpy() for value in variable.value.values]
            assert len(copies) == 2
            assert np.isfinite(copies[0]).all()
            np.testing.assert_array_equal(*copies)


def test_a_recomputed_pass_reads_the_weights_of_before_the_update() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype("float32"), np.arange(8) % 3
    weights = []
    # The race was lost in more than half of the runs.
    for memory_efficient, num_runs in ((False, 1), (True, 6)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(16, kernel_regularizer="l2"),
                layers.Dense(3),
            ]
        )
        compile_classifier(model, optimizer=keras.optimizers.SGD(10.0))
        nrs = keras_nrs.wrap(
            model,
            eps=0.3,
            perturbation="relative",
            memory_efficient=memory_efficient,
            seed=0,
        )
        start = numpy_values(nrs.variables)
        for _ in range(num_runs):
            for variable, value in zip(nrs.variables, start, strict=True):
                variable.assign(value)
            nrs.train_on_batch(x, y)
            weights.append(numpy_values(model.trainable_variables))
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


class Unused(layers.Layer):
    """Has a weight that nothing depends on, and an output without a gradient."""

    def build(self, shape: Any) -> None:
        self.unused = self.add_weight(shape=(3,), initializer="ones")
        super().build(shape)

    def call(self, x: Any) -> Any:
        return {"logits": x, "label": keras.ops.argmax(x, axis=-1)}


@pytest.mark.parametrize("options", [{}, *rest({"interval": 2})])
def test_a_recomputed_pass_leaves_out_what_has_no_gradient(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Keras's optimizers do not decay such a weight."""
    inputs = keras.Input((6,))
    layer = Unused()
    model = keras.Model(inputs, layer(layers.Dense(3)(inputs)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), {"logits": loss})
    nrs = keras_nrs.wrap(model, memory_efficient=True, **options)
    logger = logging.getLogger("tensorflow")
    logger.addHandler(caplog.handler)
    try:
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            nrs.train_on_batch(np.ones((4, 6), "float32"), {"logits": np.arange(4) % 3})
    finally:
        logger.removeHandler(caplog.handler)
    assert "watched tensor" not in caplog.text
    np.testing.assert_array_equal(layer.unused.numpy(), 1.0)


class Noisy(layers.Layer):
    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return x + tf.random.normal(tf.shape(x))


@pytest.mark.parametrize("draws", [False, True])
def test_draws_are_checked_though_replicas_exchange_moments(draws: bool) -> None:
    """Synchronized BatchNorm exchanges them, which no function in a step can."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    with devices(2):
        stack = [layers.BatchNormalization(synchronized=True), layers.Dense(3)]
        inputs = [keras.Input((3,)), *([Noisy()] if draws else [])]
        model = keras.Sequential([*inputs, *stack])
        compile_classifier(model)
        nrs = keras_nrs.wrap(model, eps=0.0)
        if not draws:
            nrs.fit(x, np.arange(8) % 3, verbose=0)
            return
        with pytest.raises(ValueError, match="must draw random numbers"):
            nrs.fit(x, np.arange(8) % 3, verbose=0)
