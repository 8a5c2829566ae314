"""Equation 3 on the outputs of both passes."""

import inspect
import re
import types
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common.masking import set_keras_mask

import keras_nrs
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import GaussianKL
from keras_nrs.step.objective import combine
from keras_nrs.step.objective import nrs_objective
from tests.support.divergences import log_softmax
from tests.support.gradients import value_and_gradients
from tests.support.precision import precision

BACKEND = keras.config.backend()
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ULP = {"float32": 2.0**-24, "float64": 2.0**-53}
# A mean of 6 positive terms of 3 roundings each, twice.
RTOL = 40 * ULP["float32"]


def number(value: Any) -> float:
    return float(ops.convert_to_numpy(value))


@pytest.fixture
def outputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and perturbed logits of 6 samples in 3 classes."""
    logits = rng.normal(size=(2, 6, 3)).astype("float32")
    return rng.integers(3, size=6), logits[0], logits[1]


# The schemes.


def test_combine_is_equation_3() -> None:
    terms = combine(2.0, 3.0, 5.0, alpha=0.5, beta=4.0)
    assert terms == (2.0 + 0.5 * 3.0 + 4.0 * 5.0, 2.0, 3.0, 5.0)
    assert terms._fields == ("total", "loss", "divergence", "perturbed_loss")


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_combine_without_some_terms(alpha: float, beta: float) -> None:
    total = combine(2.0, 3.0, 5.0, alpha=alpha, beta=beta).total
    assert total == 2.0 + alpha * 3.0 + beta * 5.0


def test_combine_normalized() -> None:
    total = combine(2.0, 3.0, 5.0, alpha=0.5, beta=3.0, normalize=True).total
    assert total == (2.0 + 0.5 * 3.0 + 3.0 * 5.0) / 4.0
    terms = combine(2.0, 3.0, 5.0, alpha=0.5, beta=3.0, normalize=True, penalty=0.5)
    assert terms.total == 0.5 + (1.5 + 0.5 * 3.0 + 3.0 * 5.0) / 4.0


@pytest.mark.parametrize("normalize", [False, True])
def test_combine_for_rpr(normalize: bool) -> None:
    """Only the perturbed loss and the weight penalty: nothing to normalize."""
    terms = combine(
        2.0,
        3.0,
        5.0,
        alpha=0.5,
        beta=4.0,
        scheme="rpr",
        normalize=normalize,
        penalty=0.25,
    )
    assert terms == (5.25, 2.0, 3.0, 5.0)


def test_penalty_counts_once() -> None:
    """It is part of the clean loss already."""
    assert combine(2.0, 3.0, 5.0, alpha=1.0, beta=1.0, penalty=0.25).total == 10.0


# The values of nrs_objective.


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize": False}])
def test_objective_equals_the_equation(
    outputs: Any, options: Any, weighted: bool, alpha: float, beta: float
) -> None:
    y, z, z_perturbed = outputs
    weights = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 3.0]) if weighted else None
    terms = nrs_objective(
        y,
        ops.convert_to_tensor(z),
        ops.convert_to_tensor(z_perturbed),
        loss=CROSSENTROPY,
        alpha=alpha,
        beta=beta,
        sample_weight=weights,
        **options,
    )
    w = np.ones(6) if weights is None else weights
    log_p, log_q = (log_softmax(r.astype("float64")) for r in (z, z_perturbed))
    loss = np.mean(w * -log_p[np.arange(6), y])
    perturbed = np.mean(w * -log_q[np.arange(6), y])
    divergence = np.mean(w * np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))
    # Log-probabilities of logits below 3 are off by at most 2e-6: (4 * 3 + 3 + 8) ULP.
    atol = 3 * 3 * 23 * ULP["float32"]
    total = loss + alpha * divergence + beta * perturbed
    if not options:
        total /= 1 + beta
    expected = (total, loss, divergence)
    np.testing.assert_allclose(
        [number(t) for t in terms],
        [*expected, perturbed],
        rtol=RTOL,
        atol=atol * (1 + alpha + beta),
    )


def test_alpha_may_be_a_tensor(outputs: Any) -> None:
    y, z, z_perturbed = map(ops.convert_to_tensor, outputs)
    alphas = (0.25, ops.convert_to_tensor(0.25), keras.Variable(0.25))
    totals = [
        number(nrs_objective(y, z, z_perturbed, loss=CROSSENTROPY, alpha=a).total)
        for a in alphas
    ]
    assert totals[0] == totals[1] == totals[2]


def test_without_perturbation_the_total_is_the_loss(outputs: Any) -> None:
    y, z, _ = map(ops.convert_to_tensor, outputs)
    total, loss, divergence, perturbed_loss = map(
        number, nrs_objective(y, z, z, loss=CROSSENTROPY)
    )
    assert divergence == 0
    assert loss == perturbed_loss
    assert total == loss


def mean_absolute(y_true: Any, y_pred: Any) -> Any:
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


@pytest.mark.parametrize(
    ("loss", "divergence"),
    [
        ("mean_absolute_error", "auto"),
        ("mae", "auto"),
        (keras.losses.mean_absolute_error, "auto"),
        (keras.losses.MeanAbsoluteError(), "auto"),
        (mean_absolute, GaussianKL()),
    ],
)
def test_every_form_of_a_loss(outputs: Any, loss: Any, divergence: Any) -> None:
    _, z, z_perturbed = outputs
    y = np.zeros_like(z)
    weights = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 3.0])
    terms = nrs_objective(
        y,
        ops.convert_to_tensor(z),
        ops.convert_to_tensor(z_perturbed),
        loss=loss,
        divergence=divergence,
        sample_weight=weights,
    )
    expected = [
        np.mean(weights * np.abs(z).mean(axis=-1)),
        np.mean(weights * np.mean((z - z_perturbed) ** 2, axis=-1) / 2),
        np.mean(weights * np.abs(z_perturbed).mean(axis=-1)),
    ]
    result = [number(term) for term in terms]
    np.testing.assert_allclose(result, [sum(expected) / 2, *expected], rtol=RTOL)


def test_a_loss_of_ones_own_needs_a_divergence(outputs: Any) -> None:
    y, z, z_perturbed = map(ops.convert_to_tensor, outputs)

    def my_loss(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    with pytest.raises(ValueError, match="my_loss"):
        nrs_objective(y, z, z_perturbed, loss=my_loss)
    kl = keras_nrs.divergences.CategoricalKL(from_logits=True)
    terms = nrs_objective(y, z, z_perturbed, loss=my_loss, divergence=kl)
    expected = nrs_objective(y, z, z_perturbed, loss=CROSSENTROPY)
    assert [number(t) for t in terms] == [number(t) for t in expected]


def test_the_reduction_of_the_loss_is_the_divergences(outputs: Any) -> None:
    y, z, z_perturbed = map(ops.convert_to_tensor, outputs)
    summed = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="sum"
    )
    sums = nrs_objective(y, z, z_perturbed, loss=summed)
    means = nrs_objective(y, z, z_perturbed, loss=CROSSENTROPY)
    np.testing.assert_allclose(
        [number(t) for t in sums], [6 * number(t) for t in means], rtol=RTOL
    )


def test_half_precision_outputs(outputs: Any) -> None:
    y, z, z_perturbed = outputs
    half = [ops.convert_to_tensor(r, dtype="bfloat16") for r in (z, z_perturbed)]
    terms = nrs_objective(y, *half, loss=CROSSENTROPY)
    full = nrs_objective(y, *(ops.cast(r, "float32") for r in half), loss=CROSSENTROPY)
    for a, b in zip(terms, full, strict=True):
        assert keras.backend.standardize_dtype(a.dtype) == "float32"
        assert number(a) == number(b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_of_another_dtype(outputs: Any, dtype: str) -> None:
    y, z, z_perturbed = outputs
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
    terms = nrs_objective(
        y, *map(ops.convert_to_tensor, (z, z_perturbed)), loss=loss, alpha=ops.ones(())
    )
    full = nrs_objective(
        y, *map(ops.convert_to_tensor, (z, z_perturbed)), loss=CROSSENTROPY
    )
    for term, expected in zip(terms, full, strict=True):
        assert keras.backend.standardize_dtype(term.dtype) == dtype
        term = ops.cast(term, "float32")
        assert number(term) == pytest.approx(number(expected), rel=0.05)


def test_masks_and_sample_weights_act_alike_on_all_terms() -> None:
    y = np.zeros((4, 3, 2), "float32")
    z, z_perturbed = (ops.ones((4, 3, 2)) for _ in range(2))
    mask = np.arange(12).reshape(4, 3) % 3 > 0
    for r in (z, z_perturbed):
        set_keras_mask(r, ops.convert_to_tensor(mask))
    weights = ops.ones((4, 3))
    terms = nrs_objective(y, z, z_perturbed, loss="mse", sample_weight=weights)
    # Of each sample 2 of 3 positions count, with an error of 1, and weigh 3 / 2.
    assert [number(t) for t in terms] == [1.0, 1.0, 0.0, 1.0]
    np.testing.assert_array_equal(ops.convert_to_numpy(weights), 1.0)


def test_ignored_classes_do_not_count(outputs: Any) -> None:
    _, z, z_perturbed = (np.asarray(o) for o in outputs)
    y = np.array([0, 1, 2, 1, 0, 1])
    ignoring = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=1
    )
    tensors = map(ops.convert_to_tensor, (y, z, z_perturbed))
    terms = nrs_objective(*tensors, loss=ignoring)
    tensors = map(ops.convert_to_tensor, (y[::2], z[::2], z_perturbed[::2]))
    kept = nrs_objective(*tensors, loss=CROSSENTROPY)
    np.testing.assert_allclose(
        [number(t) for t in terms], [number(t) for t in kept], rtol=RTOL
    )


# Errors.


@pytest.mark.parametrize("beta", [-1.0, float("nan")])
def test_beta_must_be_nonnegative(outputs: Any, beta: float) -> None:
    with pytest.raises(ValueError, match=r"`beta` must be finite and >= 0.*beta="):
        nrs_objective(*outputs, loss=CROSSENTROPY, beta=beta)


@pytest.mark.parametrize("divergence", ["kl", None, CategoricalKL])
def test_unknown_divergence(outputs: Any, divergence: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto' or a.*divergence="):
        nrs_objective(*outputs, loss=CROSSENTROPY, divergence=divergence)


def test_no_divergence_for_an_unknown_loss(outputs: Any) -> None:
    _, z, z_perturbed = outputs
    with pytest.raises(ValueError, match="'mean_absolute'"):
        nrs_objective(z, z, z_perturbed, loss=mean_absolute)


# The gradient of a linear model.


def linear_gradient(
    x: np.ndarray, y: np.ndarray, theta: Any, delta: Any, alpha: float, beta: float
) -> tuple[float, list[np.ndarray], float]:
    """Equation 3 of softmax(x W + b), its gradient, and the scale of its rounding.

    dL/dz = (p - y) / N in either pass; of the divergence, for the clean pass
    p (log(p / q) - KL) / N and for the perturbed one (q - p) / N.
    """
    (kernel, bias), (kernel_delta, bias_delta) = theta, delta
    n, classes = len(x), len(bias)
    z = x @ kernel + bias
    z_perturbed = x @ (kernel + kernel_delta) + bias + bias_delta
    log_p, log_q = log_softmax(z), log_softmax(z_perturbed)
    p, q, one_hot = np.exp(log_p), np.exp(log_q), np.eye(classes)[y]
    kl = np.sum(p * (log_p - log_q), axis=-1, keepdims=True)
    total = np.mean(
        -np.sum(one_hot * (log_p + beta * log_q), axis=-1) + alpha * kl[:, 0]
    )
    by_z = ((p - one_hot) + alpha * p * (log_p - log_q - kl)) / n
    by_z_perturbed = (beta * (q - one_hot) + alpha * (q - p)) / n
    gradient = [x.T @ (by_z + by_z_perturbed), np.sum(by_z + by_z_perturbed, axis=0)]
    # In units of the last place: a logit is off by K + 2 times the sum of its terms, a
    # log-probability by twice that and 4 M + C + 8; the derivatives above move by at
    # most (1 + beta) + alpha (2 D + 6) times that, and twice, as the backward pass
    # rounds too; a gradient sums N of them times x, and rounds N times more.
    largest = np.max(np.abs(x) @ (np.abs(kernel) + np.abs(kernel_delta)))
    largest += np.max(np.abs(bias) + np.abs(bias_delta))
    error = 2 * (x.shape[1] + 2) * largest + 4 * largest + classes + 8
    d = np.max(np.abs(log_p - log_q))
    factor = (1 + beta) + alpha * (2 * d + 6)
    scale = 2 * factor * (error + n) * max(1.0, np.mean(np.abs(x), axis=0).max())
    return float(total), gradient, float(scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 0.0), (0.0, 0.5)])
def test_gradient_of_a_linear_model(
    rng: np.random.Generator, alpha: float, beta: float, dtype: str
) -> None:
    x = rng.normal(size=(8, 5)).astype("float32")
    y = rng.integers(3, size=8)
    shapes = ((5, 3), (3,))
    theta = [rng.normal(scale=0.5, size=s).astype("float32") for s in shapes]
    delta = [rng.normal(scale=0.25, size=s).astype("float32") for s in shapes]
    in_double = [[a.astype("float64") for a in arrays] for arrays in (theta, delta)]
    expected_total, expected, scale = linear_gradient(
        x.astype("float64"), y, *in_double, alpha, beta
    )
    with precision(dtype):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        deltas = [ops.convert_to_tensor(d, dtype=dtype) for d in delta]
        inputs = ops.convert_to_tensor(x, dtype=dtype)

        def objective(*weights: Any) -> Any:
            perturbed = [w + d for w, d in zip(weights, deltas, strict=True)]
            # Operators: on torch keras.ops.matmul rounds float64 to float32.
            y_pred, y_pred_perturbed = (
                inputs @ kernel + bias for kernel, bias in (weights, perturbed)
            )
            return nrs_objective(
                y,
                y_pred,
                y_pred_perturbed,
                loss=loss,
                alpha=alpha,
                beta=beta,
                normalize=False,
            ).total

        total, gradient = value_and_gradients(
            objective, [ops.convert_to_tensor(w, dtype=dtype) for w in theta]
        )
    atol = scale * ULP[dtype]
    assert atol < {"float32": 1e-3, "float64": 1e-10}[dtype]
    # On torch Keras reduces every loss in float32 (`divide_no_nan`).
    rel = ULP["float32" if BACKEND == "torch" else dtype] * 8
    assert total == pytest.approx(expected_total, abs=atol, rel=rel)
    for value, reference in zip(gradient, expected, strict=True):
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        np.testing.assert_allclose(value, reference, rtol=0, atol=atol)


# The examples of the docstring.


def example() -> str:
    name = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}[BACKEND]
    docstring = inspect.getdoc(nrs_objective) or ""
    match = re.search(rf"On {name}:\n\n```python\n(.*?)```", docstring, re.DOTALL)
    assert match
    return match.group(1)


def run_example(source: str) -> tuple[dict[str, Any], list[Any]]:
    """The namespace after the example, and the terms of every call, in order."""
    terms: list[Any] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        terms.append(nrs_objective(*args, **kwargs))
        return terms[-1]

    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(0)
    namespace: dict[str, Any] = {
        "keras": keras,
        "keras_nrs": types.SimpleNamespace(
            perturbations=keras_nrs.perturbations, nrs_objective=recording
        ),
        "model": model,
        "x": ops.convert_to_tensor(rng.normal(size=(8, 5)), dtype="float32"),
        "y": ops.convert_to_tensor(rng.integers(3, size=8)),
        "loss": CROSSENTROPY,
    }
    if BACKEND == "jax":
        import jax

        namespace["jax"] = jax
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        namespace["tf"] = tf
    else:
        import torch

        namespace["torch"] = torch
    exec(source, namespace)
    if BACKEND == "jax":  # Once more, without a trace, to see the terms.
        namespace["objective"](
            *(namespace[n] for n in ("weights", "state", "x", "y")),
            namespace["seeds"].next(),
        )
    return namespace, terms


def test_the_example_runs() -> None:
    namespace, terms = run_example(example())
    trainable = namespace["model"].trainable_variables
    gradients = [ops.convert_to_numpy(g) for g in namespace["gradients"]]
    assert [g.shape for g in gradients] == [tuple(v.shape) for v in trainable]
    for variable, gradient in zip(trainable, gradients, strict=True):
        assert np.all(np.isfinite(gradient)), variable.path
        assert np.any(gradient != 0), variable.path
    assert number(terms[-1].divergence) > 0


def test_both_passes_of_the_example_share_their_dropout_masks() -> None:
    """Without a perturbation they are the same, bit for bit."""
    source = example()
    assert source.count("0.3") == 1
    _, terms = run_example(source.replace("0.3", "0.0"))
    assert number(terms[-1].divergence) == 0
    assert number(terms[-1].loss) == number(terms[-1].perturbed_loss)
