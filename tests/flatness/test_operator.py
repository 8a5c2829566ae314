import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import loss_landscape
from tests.support import hessians
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.asserts import relative_error
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.precision import precision

# Products of float32 in networks of three layers, and of float64.
RTOL = {"float32": 1e-5, "float64": 1e-12}


# On PyTorch Keras divides by the number of samples in float32, here without rounding.
@pytest.mark.parametrize(
    ("dtype", "smaller_batch"),
    [("float32", 10), pytest.param("float64", 16, marks=pytest.mark.matrix)],
)
def test_equals_the_dense_hessian(dtype: str, smaller_batch: int) -> None:
    """For all weights, over one batch and over several."""
    with precision(dtype):
        model = hessians.classifier()
        x, y = hessians.data(32)
        expected = hessians.dense_hessian(
            model, x, y, model.trainable_variables, regularizers=True
        )
        vector = np.random.default_rng(0).normal(size=215)
        for batch_size in (32, smaller_batch):
            operator = hessian_operator(
                model, x, y, variables="all", batch_size=batch_size
            )
            assert operator.shape == expected.shape == (215, 215)
            assert relative_error(operator.to_dense(), expected) < RTOL[dtype]
            product = operator @ vector
            assert product.dtype == "float64"
            np.testing.assert_allclose(
                product, expected @ vector, rtol=0, atol=100 * RTOL[dtype]
            )


@pytest.mark.parametrize(
    ("layers", "regularizers"),
    [
        (("conv", "dense"), True),
        *rest(pytest.param(("conv", "dense"), False), pytest.param(("bias",), True)),
    ],
)
def test_convolutions_and_penalties(
    layers: tuple[str, ...], regularizers: bool, rng: np.random.Generator
) -> None:
    x, y = image_data(32)
    model = cnn(penalty=0.1, dropout=0.5, seed=0)
    model.set_weights([w + rng.uniform(0, 0.2, w.shape) for w in model.get_weights()])
    operator = hessian_operator(
        model,
        x,
        y,
        variables=lambda v: any(name in v.path for name in layers),
        regularizers=regularizers,
        batch_size=16,
    )
    expected = hessians.dense_hessian(
        model, x, y, operator.variables, regularizers=regularizers
    )
    assert relative_error(operator.to_dense(), expected) < 1e-4


@pytest.mark.matrix
def test_sample_weights() -> None:
    model = hessians.classifier()
    x, y = hessians.data(32)
    weights = np.linspace(0, 3, 32).astype("float32")
    operator = hessian_operator(model, x, y, sample_weight=weights, batch_size=10)
    doubled = hessian_operator(model, x, y, sample_weight=2 * weights)
    by_sample = [
        w * hessian_operator(model, x[i : i + 1], y[i : i + 1]).to_dense()
        for i, w in enumerate(weights)
    ]
    expected = np.mean(by_sample, axis=0)
    assert relative_error(operator.to_dense(), expected) < 1e-5
    assert relative_error(doubled.to_dense(), 2 * expected) < 1e-5


def test_fisher_information_is_the_gauss_newton_matrix() -> None:
    """J.T (diag(p) - p p.T) J, with logits and with softmax, which differ nowhere."""
    x, y = hessians.data(16)
    logits = hessians.classifier()
    parameters = logits.trainable_variables
    p = keras.activations.softmax(ops.convert_to_tensor(logits(x)))
    p = ops.convert_to_numpy(p).astype("float64")
    state = [ops.convert_to_numpy(v) for v in parameters]
    jacobian = np.zeros((16, 3, 215))
    step = 1e-2
    for j in range(215):
        sides = []
        for sign in (1, -1):
            flat = np.concatenate([s.ravel() for s in state]).astype("float64")
            flat[j] += sign * step
            ends = np.cumsum([s.size for s in state])[:-1]
            for v, part in zip(parameters, np.split(flat, ends), strict=True):
                v.assign(part.reshape(v.shape))
            sides.append(ops.convert_to_numpy(logits(x)).astype("float64"))
        jacobian[:, :, j] = (sides[0] - sides[1]) / (2 * step)
    for v, value in zip(parameters, state, strict=True):
        v.assign(value)
    middle = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]
    expected = np.einsum("nia,nij,njb->ab", jacobian, middle, jacobian) / 16
    probabilities = keras.Sequential([*logits.layers, layers.Softmax()])
    probabilities.compile(loss="sparse_categorical_crossentropy")
    for model in (logits, probabilities):
        operator = hessian_operator(
            model, x, y, variables="all", curvature="fisher", batch_size=8
        )
        fisher = operator.to_dense()
        # A central difference has an error of the order of the squared step.
        assert relative_error(fisher, expected) < 1e-3
        assert np.linalg.eigvalsh(fisher)[0] > -1e-5


def multi_output() -> keras.Model:
    """Attention, BatchNorm, dropout, an embedding, two outputs with own losses."""
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 8)(tokens)
    x = x + layers.MultiHeadAttention(2, 4, dropout=0.3)(x, x)
    x = layers.BatchNormalization()(layers.Dense(6, activation="gelu")(x))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling1D()(x))
    classes = layers.Dense(3, name="classes")(x)
    value = layers.Dense(1, name="value")(x)
    model = keras.Model(tokens, {"classes": classes, "value": value})
    model.compile(
        loss={
            "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "value": "mse",
        },
        loss_weights={"classes": 1.0, "value": 0.25},
    )
    return model


def test_attention_batch_norm_dropout_and_several_outputs() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (24, 5)).astype("int32")
    y = {
        "classes": rng.integers(0, 3, 24).astype("int32"),
        "value": rng.normal(size=(24, 1)).astype("float32"),
    }
    model = multi_output()
    operator = hessian_operator(model, tokens, y)
    assert {v.path.split("/")[0] for v in operator.variables} == {"classes", "value"}
    full = hessian_operator(model, tokens, y, variables="all", batch_size=12)
    vector = np.random.default_rng(1).normal(size=full.shape[0])
    vector /= np.linalg.norm(vector)
    values = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    product = full @ vector

    def loss(distance: float) -> float:
        direction = full.as_direction(vector)
        for v, w, d in zip(model.trainable_variables, values, direction, strict=True):
            v.assign(w + distance * d)
        result: float = model.evaluate(tokens, y, batch_size=12, verbose=0)[0]
        return result

    step = 0.05
    second = (loss(step) - 2 * loss(0) + loss(-step)) / step**2
    assert second == pytest.approx(vector @ product, abs=2e-3)


@pytest.mark.matrix
def test_the_model_is_left_as_it_was() -> None:
    """Its weights, state and seeds; and the operator keeps to the weights it saw."""
    x, y = image_data(32)
    model = cnn(dropout=0.5, seed=0)
    before = numpy_values(model.variables)
    operator = hessian_operator(model, x, y)
    first = operator.to_dense()
    assert_equal(numpy_values(model.variables), before)
    model.set_weights([0 * w for w in model.get_weights()])
    np.testing.assert_array_equal(operator.to_dense(), first)


def test_draws_in_inference_mode_are_the_same_at_each_pass() -> None:
    """Of an unseeded dropout that is always on: one mask for each batch."""

    class AlwaysOn(layers.Dropout):
        def call(self, inputs: Any, training: bool = True) -> Any:
            return super().call(inputs, training=True)

    x, y = hessians.data(24)
    inputs = keras.Input((6,))
    h = AlwaysOn(0.5)(layers.Dense(8)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(h))
    compile_classifier(model)
    operator = hessian_operator(model, x, y, batch_size=8)
    first = operator.to_dense()
    keras.random.uniform((3,))
    np.testing.assert_array_equal(operator.to_dense(), first)
    line = loss_landscape(
        model, x, y, directions=[[0 * w for w in model.get_weights()]]
    )
    np.testing.assert_allclose(line.losses, line.losses[0], rtol=1e-6)


@pytest.mark.matrix
def test_split_and_direction() -> None:
    model = hessians.classifier()
    x, y = hessians.data(8)
    operator = hessian_operator(model, x, y)
    vector = np.arange(operator.shape[0], dtype="float64")
    kernel, bias = operator.split(vector)
    assert (kernel.shape, bias.shape) == ((8, 3), (3,))
    direction = operator.as_direction(vector)
    assert [d.shape for d in direction] == [v.shape for v in model.trainable_variables]
    assert not any(np.any(d) for d in direction[:-2])
    np.testing.assert_array_equal(direction[-1], vector[-3:])


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class OnceDifferentiable(layers.Layer):
    """A cube whose gradient has no gradient, on each backend in its own way."""

    def call(self, inputs: Any) -> Any:
        backend = keras.config.backend()
        if backend == "torch":
            import torch

            class Cube(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, x: Any) -> Any:
                    ctx.save_for_backward(x)
                    return x**3

                @staticmethod
                @torch.autograd.function.once_differentiable
                def backward(ctx: Any, g: Any) -> Any:
                    return 3 * ctx.saved_tensors[0] ** 2 * g

            return Cube.apply(inputs)
        if backend == "tensorflow":
            import tensorflow as tf

            @tf.custom_gradient
            def cube(x: Any) -> Any:
                def gradient(g: Any) -> Any:
                    @tf.custom_gradient
                    def only_forward(x: Any, g: Any) -> Any:
                        def fail(*_: Any) -> Any:
                            raise LookupError("No gradient defined for operation.")

                        return 3 * x**2 * g, fail

                    return only_forward(x, g)

                return x**3, gradient

            return cube(inputs)
        import jax

        @jax.custom_vjp
        def square(x: Any) -> Any:
            return 3 * x**2

        def fail(*_: Any) -> Any:
            raise NotImplementedError("No gradient defined for operation.")

        square.defvjp(lambda x: (3 * x**2, None), fail)

        @jax.custom_vjp
        def cube(x: Any) -> Any:
            return x**3

        cube.defvjp(lambda x: (x**3, x), lambda x, g: (square(x) * g,))
        return cube(inputs)


def test_what_cannot_be_differentiated_twice_is_named() -> None:
    x, y = hessians.data(8)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4), OnceDifferentiable(), layers.Dense(3)],
        name="once",
    )
    compile_classifier(model)
    operator = hessian_operator(model, x, y, variables="all")
    with pytest.raises(NotImplementedError, match="'once' cannot be differentiated"):
        operator @ np.ones(operator.shape[0])
    last_layer = hessian_operator(model, x, y)
    assert np.isfinite(last_layer @ np.ones(last_layer.shape[0])).all()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variables": "first"}, "`variables` must be 'last_layer', 'all', the name"),
        ({"variables": lambda v: False}, "`variables` must select at least one"),
        ({"curvature": "newton"}, "`curvature` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"steps": 0}, "`steps` must be an integer >= 1"),
        ({"sample_weight": np.ones(3)}, "must be arrays with one number of samples"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    x, y = hessians.data(8)
    with pytest.raises(ValueError, match=re.escape(message)):
        hessian_operator(hessians.classifier(), x, y, **options)


@pytest.mark.matrix
def test_measuring_again_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a callback does at every epoch; but `compile()` changes the loss."""
    x, y = hessians.data(8)
    model = hessians.classifier()
    first = hessian_operator(model, x, y)
    product = first @ np.ones(27)
    model.set_weights([2 * w for w in model.get_weights()])
    second = hessian_operator(model, x, y)
    assert second._hessian_at is first._hessian_at
    assert relative_error(second @ np.ones(27), product) > 0.01
    compile_classifier(model, loss=lambda y, z: ops.mean(z**2, axis=-1))
    squares = hessian_operator(model, x, y)
    features = keras.Model(model.inputs[0], model.layers[-2].output)
    h = np.column_stack([ops.convert_to_numpy(features(x)), np.ones(8)])
    expected = np.kron(h.T @ h / 8, 2 / 3 * np.eye(3))
    assert relative_error(squares.to_dense(), expected) < 1e-5


def test_an_operator_outlives_training() -> None:
    x, y = image_data(32)
    model = cnn()
    operator = hessian_operator(model, x, y, batch_size=16)
    before = operator.to_dense()
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(operator.to_dense(), before)


@pytest.mark.matrix
def test_fisher_information_needs_no_labels() -> None:
    x, y = hessians.data(8)
    model = hessians.classifier(metrics=["accuracy"])
    without = hessian_operator(model, x, curvature="fisher").to_dense()
    with_labels = hessian_operator(model, x, y, curvature="fisher").to_dense()
    assert relative_error(without, with_labels) < 1e-6
    gaussian = keras_nrs.divergences.GaussianKL()
    wrapped = keras_nrs.wrap(model, divergence=gaussian)
    fisher = hessian_operator(wrapped, x, curvature="fisher").to_dense()
    features = keras.Model(model.inputs[0], model.layers[-2].output)
    h = np.column_stack([ops.convert_to_numpy(features(x)), np.ones(8)])
    expected = np.kron(h.T @ h / 8, np.eye(3) / 3)
    assert relative_error(fisher, expected) < 1e-5
