"""Which variables are measured."""

import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import hessian_trace
from tests.support import hessians
from tests.support.asserts import relative_error
from tests.support.matrix import rest
from tests.support.networks import compile_classifier


@pytest.mark.matrix
def test_freezing_a_layer_between_measurements() -> None:
    x, y = hessians.data(8)
    model = hessians.classifier()
    hessian_operator(model, x, y).to_dense()
    model.layers[0].trainable = False
    compile_classifier(model)
    operator = hessian_operator(model, x, y, variables="all")
    assert operator.shape == (215 - 84, 215 - 84)
    model.layers[0].trainable, model.layers[1].trainable = True, False
    expected = hessians.dense_hessian(
        model, x, y, model.trainable_variables, regularizers=True
    )
    operator = hessian_operator(model, x, y, variables="all")
    assert relative_error(operator.to_dense(), expected) < 1e-5


@pytest.mark.only_torch
def test_the_last_layer_before_many_frozen_blocks() -> None:
    """Each block doubles the number of paths back from the output."""
    inputs = keras.Input((4,))
    trained = layers.Dense(4)
    x = trained(inputs)
    for _ in range(60):
        x = layers.add([x, layers.Dense(4, trainable=False)(x)])
    model = keras.Model(inputs, x)
    model.compile(loss="mse")
    operator = hessian_operator(model, np.ones((2, 4)), np.ones((2, 4)))
    assert list(map(id, operator.variables)) == list(map(id, trained.weights))


class Scaled(layers.Layer):
    """A learned temperature, of shape ()."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs: Any) -> Any:
        return inputs * self.scale


@pytest.mark.matrix
def test_a_scalar_weight() -> None:
    x, y = hessians.data(16)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, Scaled()(hessians.Product(3, is_linear=True)(inputs)))
    compile_classifier(model)
    variables = model.trainable_variables
    expected = hessians.dense_hessian(model, x, y, variables, regularizers=True)
    operator = hessian_operator(model, x, y, variables="all")
    assert operator.shape == (22, 22)
    assert relative_error(operator.to_dense(), expected) < 1e-5
    assert hessian_operator(model, x, y).shape == (1, 1)
    largest = hessian_eigenvalues(model, x, y, variables="all").eigenvalues
    assert largest == pytest.approx(np.linalg.eigvalsh(expected)[-1:], rel=1e-4)
    trace = hessian_trace(model, x, y, variables="all").value
    assert trace == pytest.approx(np.trace(expected), rel=1e-4)
    density = hessian_density(model, x, y, variables="all", num_samples=1)
    assert density.nodes.max() == pytest.approx(largest[0], rel=1e-4)


class Nested(keras.Model):
    """A head that is a model, and whose last layer is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = layers.Dense(8)
        self.head = keras.Sequential([layers.Dense(7), layers.Dense(5, name="last")])

    def call(self, inputs: Any) -> Any:
        return self.head(self.features(inputs))


class HeadFirst(keras.Model):
    """The layer made first is called last, and a softmax follows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = layers.Dense(5, name="last")
        self.body = layers.Dense(8, activation="tanh")

    def call(self, inputs: Any) -> Any:
        return ops.softmax(self.head(self.body(inputs)))


class OwnKernel(keras.Model):
    """An output kernel and a bias that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers.Dense(8, activation="tanh")

    def build(self, shape: Any) -> None:
        self.body.build(shape)
        self.position = self.add_weight(shape=(4, 3), name="position")
        self.kernel = self.add_weight(shape=(8, 5), name="last_kernel")
        self.bias = self.add_weight(shape=(5,), name="last_bias")

    def call(self, inputs: Any) -> Any:
        h = self.body(inputs + self.position)
        return ops.relu(ops.matmul(h, self.kernel) + self.bias)


class Tied(keras.Model):
    """An embedding whose transpose makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = layers.Embedding(5, 4, name="last")
        self.mixing = layers.Dense(4)

    def call(self, inputs: Any) -> Any:
        h = self.mixing(self.embedding(ops.cast(inputs[:, 0] > 0, "int32")))
        return ops.matmul(h, ops.transpose(self.embedding.embeddings))


class TwoOutputs(keras.Model):
    """Outputs of two layers, one of which has a learned scale; and unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(5, name="last_1")
        self.body = layers.Dense(8)
        self.second = layers.Dense(5, name="last_2")
        self.unused = layers.Dense(5)

    def build(self, shape: Any) -> None:
        self.body.build(shape)
        for layer in (self.first, self.second, self.unused):
            layer.build((None, 8))
        self.factor = self.add_weight(shape=(1, 5), initializer="ones", name="last_3")

    def call(self, inputs: Any) -> Any:
        h = self.body(inputs)
        return {"a": self.first(h), "b": self.second(h) + self.factor}


class Wrapped(keras.Model):
    """A functional model around a subclassed one."""

    def __new__(cls) -> Any:
        inputs = keras.Input((3,))
        return keras.Model(inputs, HeadFirst()(inputs))


SHAPES: dict[Any, Any] = {
    HeadFirst: [(8, 5), (5,)],
    OwnKernel: [(8, 5), (5,)],
    Nested: [(7, 5), (5,)],
    Tied: [(5, 4)],
    Wrapped: [(8, 5), (5,)],
    TwoOutputs: [(8, 5), (5,), (8, 5), (5,), (1, 5)],
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "make", [HeadFirst, OwnKernel, *rest(Nested, Tied, Wrapped, TwoOutputs)]
)
def test_the_last_layer_of_a_subclassed_model(make: Any) -> None:
    model = make()
    model.compile(loss="mse")
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
    outputs = model(x)
    y = keras.tree.map_structure(lambda o: np.zeros(o.shape, "float32"), outputs)
    variables = hessian_operator(model, x, y).variables
    assert sorted(tuple(v.shape) for v in variables) == sorted(SHAPES[make])
    assert all("last" in v.path for v in variables)
    called = {"call", "quantized_call"}
    for layer in model._flatten_layers():
        assert not called & vars(layer).keys()


def test_frameworks_own_operations_after_the_last_layer() -> None:
    """Of which Keras makes no graph."""

    class Raw(HeadFirst):
        def call(self, inputs: Any) -> Any:
            z = self.head(self.body(inputs))
            return z * z.__abs__() if keras.config.backend() != "torch" else z.sin()

    model = Raw()
    model.compile(loss="mse")
    x, y = np.ones((4, 3), "float32"), np.ones((4, 5), "float32")
    model(x)
    variables = hessian_operator(model, x, y).variables
    assert [tuple(v.shape) for v in variables] == [(8, 5), (5,)]
    assert "last" in variables[0].path


@pytest.mark.only_torch
def test_a_functional_model_that_uses_a_weight_by_itself() -> None:
    embedding = layers.Embedding(4, 5)
    embedding.build((None,))
    inputs = keras.Input((), dtype="int32")
    h = layers.Dense(4)(embedding(inputs))
    model = keras.Model(inputs, ops.matmul(h, embedding.embeddings))
    model.compile(loss="mse")
    x, y = np.arange(4), np.ones((4, 5), "float32")
    (variable,) = hessian_operator(model, x, y).variables
    assert variable is embedding.embeddings


@pytest.mark.only_torch
def test_an_output_without_a_derivative_asks_for_a_choice() -> None:
    class Classes(HeadFirst):
        def call(self, inputs: Any) -> Any:
            return ops.argmax(self.head(self.body(inputs)), axis=-1)

    model = Classes()
    model.compile(loss="mse")
    x = np.ones((4, 3), "float32")
    model(x)
    with pytest.raises(ValueError, match="`variables` must select at least one"):
        hessian_operator(model, x, np.ones(4))


def blocks() -> keras.Model:
    """A model in a model, with a frozen layer."""
    block = keras.Sequential(
        [layers.Dense(4, name="first"), layers.Dense(4, name="second")], name="block"
    )
    frozen = layers.Dense(4, name="frozen", trainable=False)
    stack = [keras.Input((3,)), block, frozen, layers.Dense(2, name="head")]
    model = keras.Sequential(stack)
    model.compile(loss="mse")
    return model


X, Y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def selected(model: keras.Model, variables: Any) -> list[str]:
    """The layers and names of the selected variables."""
    found = hessian_operator(model, X, Y, variables=variables).variables
    return ["/".join(v.path.split("/")[-2:]) for v in found]


@pytest.mark.matrix
def test_layers_names_and_expressions() -> None:
    model = blocks()
    block, _, head = model.layers
    first = ["first/kernel", "first/bias"]
    second = ["second/kernel", "second/bias"]
    last = ["head/kernel", "head/bias"]
    for variables, expected in (
        (head, last),
        (block, first + second),
        ("first", first),
        ("block", first + second),
        (block.layers[1].path, second),
        (head.kernel.path, ["head/kernel"]),
        (head.bias, ["head/bias"]),
        (re.compile("kernel$"), ["first/kernel", "second/kernel", "head/kernel"]),
        (re.compile(r"(first|head)/b"), ["first/bias", "head/bias"]),
        ([head, "first"], first + last),
        (["last_layer", block.layers[0].kernel], ["first/kernel", *last]),
        ([re.compile("head"), head], last),
    ):
        assert selected(model, variables) == expected


@pytest.mark.matrix
def test_the_hessian_of_a_layer_is_a_block_of_the_whole() -> None:
    x, y = hessians.data(16)
    model = hessians.classifier()
    whole = hessian_operator(model, x, y, variables="all").to_dense()
    layer = model.layers[1]
    of_layer = hessian_operator(model, x, y, variables=[layer]).to_dense()
    start = sum(int(np.prod(v.shape)) for v in model.layers[0].trainable_variables)
    block = slice(start, start + len(of_layer))
    assert relative_error(of_layer, whole[block, block]) < 1e-5
    trace = hessian_trace(model, x, y, variables=layer.name, num_products=500)
    assert trace.value == pytest.approx(np.trace(of_layer), rel=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("variables", "error", "message"),
    [
        ("frist", ValueError, r"'frist', which no layer.*Near it are \['first'"),
        ("zzz", ValueError, r"There are \['block', 'first', 'second', 'head'\]"),
        ("frozen", ValueError, "'frozen', which has none, or is frozen"),
        (["head", "hed"], ValueError, r"'hed'.*Near it are \['head'"),
        (re.compile("gamma"), ValueError, "expression.*gamma.*none of"),
        (layers.Dense(1, name="new"), ValueError, "'new' that is not in the model"),
        (3, TypeError, "Received: 3 of type int"),
        ([None], TypeError, "Received: None of type NoneType"),
        ([], ValueError, "must select at least one"),
        (lambda v: False, ValueError, "must select at least one"),
    ],
)
def test_what_is_not_found(variables: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        selected(blocks(), variables)
    foreign = blocks().layers[-1].kernel
    with pytest.raises(ValueError, match="A variable in `variables` must be"):
        selected(blocks(), foreign)
