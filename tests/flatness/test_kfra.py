from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import kfra_max_eigenvalue
from tests.support import hessians
from tests.support.arrays import to_numpy
from tests.support.data import image_data
from tests.support.divergences import softmax
from tests.support.matrix import rest
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

pytestmark = pytest.mark.matrix


def largest(matrix: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(matrix)[-1])


@pytest.mark.parametrize("ends_with_softmax", [False, *rest(True)])
def test_closed_form_of_a_linear_softmax_model(ends_with_softmax: bool) -> None:
    x, y = hessians.data(32)
    activation = "softmax" if ends_with_softmax else None
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3, activation)])
    loss = keras.losses.SparseCategoricalCrossentropy(not ends_with_softmax)
    model.compile(loss=loss)
    kernel, bias = map(to_numpy, model.weights)
    p = softmax(x.astype("float64") @ kernel + bias)
    a = np.column_stack([x, np.ones(32)]).astype("float64")
    of_samples = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]
    expected = largest(a.T @ a / 32) * largest(of_samples.mean(axis=0))
    result = kfra_max_eigenvalue(model, x, batch_size=10)
    assert result.eigenvalue == pytest.approx(expected, rel=1e-5)
    # Where all samples have one p, or are one, it is the exact eigenvalue.
    for name in ("same p", "one sample"):
        x_n, y_n = (x, y) if name == "same p" else (x[:1], y[:1])
        if name == "same p":
            model.set_weights([0 * kernel, bias])
        exact = hessian_eigenvalues(model, x_n, y_n, tol=1e-6).eigenvalues[0]
        found = kfra_max_eigenvalue(model, x_n).eigenvalue
        assert found == pytest.approx(exact, rel=1e-4)


def test_recursion_through_dense_and_elementwise_layers() -> None:
    """Against NumPy, with BatchNorm, dropout and an activation as a layer."""
    x, _ = hessians.data(64)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, "tanh", name="first"),
            layers.Dropout(0.5),
            layers.Dense(4, use_bias=False, name="second"),
            layers.BatchNormalization(),
            layers.Activation("sigmoid"),
            layers.Dense(3, name="third"),
            layers.Softmax(),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    model.layers[3].set_weights(rng.uniform(0.5, 2, (4, 4)))
    w1, b1, w2, gamma, beta, w3, b3, mean, variance = _weights(model)
    a0 = x.astype("float64")
    a1 = np.tanh(a0 @ w1 + b1)
    scale = gamma / np.sqrt(variance + 1e-3)
    a2 = 1 / (1 + np.exp(-((a1 @ w2 - mean) * scale + beta)))
    p = softmax(a2 @ w3 + b3)
    n = len(x)

    def moments(a: np.ndarray, bias: bool) -> np.ndarray:
        a = np.column_stack([a, np.ones(n)]) if bias else a
        return a.T @ a / n

    g3 = (p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]).mean(axis=0)
    s2 = a2 * (1 - a2) * scale
    g2 = (s2.T @ s2 / n) * (w3 @ g3 @ w3.T)
    s1 = 1 - a1**2
    g1 = (s1.T @ s1 / n) * (w2 @ g2 @ w2.T)
    expected = {
        "third": largest(moments(a2, True)) * largest(g3),
        "second": largest(moments(a1, False)) * largest(g2),
        "first": largest(moments(a0, True)) * largest(g1),
    }
    result = kfra_max_eigenvalue(model, x, variables="all", batch_size=24)
    assert result.layers == pytest.approx(expected, rel=1e-4)
    assert result.eigenvalue == max(result.layers.values())
    last = kfra_max_eigenvalue(model, x)
    assert last.layers == pytest.approx({"third": expected["third"]}, rel=1e-4)


def _weights(model: Any) -> list[np.ndarray]:
    first, _, second, norm, _, third, _ = model.layers
    variables = [
        *first.weights,
        *second.weights,
        norm.gamma,
        norm.beta,
        *third.weights,
        norm.moving_mean,
        norm.moving_variance,
    ]
    return [to_numpy(v) for v in variables]


def test_after_convolutions_and_under_its_bound() -> None:
    x, y = image_data(64)
    model = cnn(dropout=0.3, seed=0)
    model.fit(x, y, epochs=3, verbose=0)
    result = kfra_max_eigenvalue(model, x)
    exact = hessian_eigenvalues(model, x, y).eigenvalues[0]
    assert 0 < exact <= result.upper_bound
    assert result.eigenvalue <= result.upper_bound * (1 + 1e-6)


def test_it_can_be_too_small() -> None:
    """Two samples, one of which has all of the inputs and all of the uncertainty."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss)
    model.set_weights([np.array([[0.0, 0.0], [20.0, -20.0]], "float32")])
    x = np.array([[1.0, 0.0], [0.0, 1.0]], "float32")
    exact = hessian_eigenvalues(model, x, np.zeros(2, "int32")).eigenvalues[0]
    assert exact == pytest.approx(0.25, rel=1e-4)
    assert kfra_max_eigenvalue(model, x).eigenvalue == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "activation", "units"),
    [("mse", None, 2), ("binary_crossentropy", "sigmoid", 1)],
)
def test_other_losses(loss: str, activation: str | None, units: int) -> None:
    """A single sample, for which the factors are exact."""
    x = np.array([[1.0, -2.0]], "float32")
    y = np.ones((1, units), "float32")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(units, activation)])
    model.compile(loss=loss)
    exact = hessian_eigenvalues(model, x, y).eigenvalues[0]
    assert kfra_max_eigenvalue(model, x).eigenvalue == pytest.approx(exact, rel=1e-4)


def test_what_is_not_covered_is_named() -> None:
    x, _ = image_data(8)
    model = cnn()
    with pytest.raises(ValueError, match=r"the layers \['conv2d.*'\] are not covered"):
        kfra_max_eigenvalue(model, x, variables="all")
    with pytest.raises(ValueError, match="`variables` must be one of"):
        kfra_max_eigenvalue(model, x, variables="first")
    convolution = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(3, 3)])
    convolution.compile(loss="mse")
    with pytest.raises(ValueError, match="must end with a Dense layer"):
        kfra_max_eigenvalue(convolution, x)
    dense = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    dense.compile(loss="mae")
    with pytest.raises(ValueError, match="the loss 'mean_absolute_error'"):
        kfra_max_eigenvalue(dense, np.ones((2, 2)))
    dense.compile(loss="categorical_crossentropy")
    with pytest.raises(ValueError, match="from_logits=False after the activations"):
        kfra_max_eigenvalue(dense, np.ones((2, 2)))
    attention = keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, "softmax", name="gate"), layers.Dense(2)]
    )
    attention.compile(loss="mse")
    with pytest.raises(ValueError, match=r"the layers \['gate'\] are not covered"):
        kfra_max_eigenvalue(attention, np.ones((2, 2)), variables="all")
    dense.compile(loss=keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(ValueError, match="with reduction='sum'"):
        kfra_max_eigenvalue(dense, np.ones((2, 2)))
    inputs = keras.Input((2,))
    shared = layers.Dense(2, name="shared")
    twice = keras.Model(inputs, layers.Dense(2)(shared(shared(inputs))))
    twice.compile(loss="mse")
    with pytest.raises(ValueError, match=r"each layer once.*'shared', 'shared'"):
        kfra_max_eigenvalue(twice, np.ones((2, 2)), variables="all")
    dense.compile(loss="mse")
    dense.set_weights([np.full((2, 2), np.nan), np.zeros(2)])
    with pytest.raises(ValueError, match=r"finite outputs.*diverged"):
        kfra_max_eigenvalue(dense, np.ones((2, 2)))
    subclassed = Subclassed()
    compile_classifier(subclassed)
    subclassed(x)
    with pytest.raises(ValueError, match="must be a Sequential or functional model"):
        kfra_max_eigenvalue(subclassed, x)
