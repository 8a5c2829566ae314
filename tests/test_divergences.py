"""The divergence of two outputs: its value, its gradient, and which one is chosen."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops
from keras.src.backend.common.masking import set_keras_mask

from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence
from keras_nrs.divergences import GaussianKL
from tests.support.arrays import ULP
from tests.support.arrays import copied
from tests.support.arrays import tensor
from tests.support.arrays import to_numpy
from tests.support.divergences import bernoulli
from tests.support.divergences import categorical
from tests.support.divergences import log_softmax
from tests.support.divergences import logits
from tests.support.divergences import rounding
from tests.support.gradients import value_and_gradients

BACKEND = keras.config.backend()
REDUCTIONS = ("sum", "sum_over_batch_size")


def gradients(function: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
    tensors = [tensor(array) for array in arrays]
    return [g.astype("float64") for g in value_and_gradients(function, tensors)[1]]


# The categorical divergence.


def test_categorical_from_logits_equals_the_reference() -> None:
    p, q = logits(0, (50, 7)), logits(1, (50, 7))
    kl = CategoricalKL(from_logits=True, reduction=None)(tensor(p), tensor(q))
    expected = categorical(log_softmax(p), log_softmax(q))
    np.testing.assert_allclose(to_numpy(kl), expected, rtol=0, atol=rounding(p, q, 7))


def test_categorical_from_probabilities_equals_the_reference() -> None:
    # In float32 from here on: none is below 1e-7, where they would be clipped.
    p, q = (np.exp(log_softmax(logits(s, (50, 7), 2.0))) for s in (0, 1))
    p, q = p.astype("float32"), q.astype("float32")
    assert min(p.min(), q.min()) > 1e-6
    kl = CategoricalKL(reduction=None)(tensor(p), tensor(q))
    log_p, log_q = (np.log(r.astype("float64")) for r in (p, q))
    expected = categorical(log_softmax(log_p), log_softmax(log_q))
    # The division and the logarithm double the error of a log-probability.
    atol = 2 * rounding(log_p, log_q, 7)
    np.testing.assert_allclose(to_numpy(kl), expected, rtol=0, atol=atol)


def test_unnormalized_probabilities_are_normalized() -> None:
    p, q = (np.exp(logits(s, (20, 5), 1.0)) for s in (0, 1))
    kl = CategoricalKL()
    scaled = kl(tensor(4 * p), tensor(2 * q))  # Exact: powers of two.
    np.testing.assert_array_equal(to_numpy(kl(tensor(p), tensor(q))), to_numpy(scaled))


def test_categorical_along_another_axis() -> None:
    p, q = logits(0, (4, 3, 6)), logits(1, (4, 3, 6))
    last = CategoricalKL(from_logits=True)(tensor(p), tensor(q))
    first = CategoricalKL(from_logits=True, axis=1)(
        tensor(p.transpose(0, 2, 1)), tensor(q.transpose(0, 2, 1))
    )
    assert float(first) == pytest.approx(float(last), abs=2 * rounding(p, q, 6))


@pytest.mark.parametrize(
    "divergence",
    [
        CategoricalKL(),
        CategoricalKL(from_logits=True),
        BernoulliKL(),
        BernoulliKL(from_logits=True),
        GaussianKL(0.3),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'from_logits', '')}",
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equal_outputs_do_not_diverge(divergence: Divergence, dtype: str) -> None:
    outputs = np.exp(log_softmax(logits(0, (9, 5), 10.0)))
    if getattr(divergence, "from_logits", False):
        outputs = logits(0, (9, 5), 100.0)
    outputs = tensor(outputs, dtype)
    assert float(divergence(outputs, outputs)) == 0.0


def test_huge_logits() -> None:
    kl = CategoricalKL(from_logits=True)
    p, q = np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])
    # p is (1, 0, 0) and log q is (-2e4, 0, -1e4), without rounding.
    assert float(kl(tensor(p), tensor(q))) == 2e4
    by_p, by_q = gradients(kl, p, q)
    np.testing.assert_array_equal(by_p, 0.0)
    np.testing.assert_array_equal(by_q, [[-1.0, 1.0, 0.0]])


def test_certain_probabilities() -> None:
    """Zeros are clipped at keras.config.epsilon(), renormalized."""
    p, q = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]])
    log_p, log_q = (log_softmax(np.log(np.clip(r, 1e-7, 1.0))) for r in (p, q))
    kl = CategoricalKL()
    assert float(kl(tensor(p), tensor(q))) == pytest.approx(
        float(categorical(log_p, log_q)[0]), abs=2 * rounding(log_p, log_q, 3)
    )
    for gradient in gradients(kl, p, q):
        assert np.all(np.isfinite(gradient))


def test_categorical_gradients_equal_their_closed_forms() -> None:
    z, z_perturbed = logits(0, (6, 5)), logits(1, (6, 5))
    log_p, log_q = log_softmax(z), log_softmax(z_perturbed)
    p, q = np.exp(log_p), np.exp(log_q)
    kl = categorical(log_p, log_q)[:, None]
    by_p, by_q = gradients(
        CategoricalKL(from_logits=True, reduction="sum"), z, z_perturbed
    )
    # Backwards each rounding of the forward pass occurs once more, and once in the
    # terms that are subtracted.
    atol = 3 * rounding(z, z_perturbed, 5)
    np.testing.assert_allclose(by_p, p * (log_p - log_q - kl), rtol=0, atol=atol)
    np.testing.assert_allclose(by_q, q - p, rtol=0, atol=atol)


finite_logits = hypothesis.extra.numpy.arrays(
    "float32", (2, 3, 4), elements=strategies.floats(-1e4, 1e4, width=32)
)
small_logits = hypothesis.extra.numpy.arrays(
    "float32", (2, 3, 4), elements=strategies.floats(-100, 100, width=32)
)
properties = hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, database=None
)


@properties
@hypothesis.given(finite_logits)
def test_categorical_is_never_negative(pair: np.ndarray) -> None:
    kl = CategoricalKL(from_logits=True, reduction=None)(*map(tensor, pair))
    kl = to_numpy(kl)
    assert np.all(np.isfinite(kl))
    assert np.all(kl >= -rounding(*pair, 4))


@properties
@hypothesis.given(finite_logits)
def test_bernoulli_is_never_negative(pair: np.ndarray) -> None:
    kl = BernoulliKL(from_logits=True, reduction=None)(*map(tensor, pair))
    kl = to_numpy(kl)
    assert np.all(np.isfinite(kl))
    # A Bernoulli with logit z is a categorical with logits z and 0.
    assert np.all(kl >= -rounding(*pair, 2))


@properties
@hypothesis.given(small_logits, strategies.floats(-100, 100, width=32))
def test_a_shift_of_all_logits_changes_nothing(pair: np.ndarray, shift: float) -> None:
    kl = CategoricalKL(from_logits=True, reduction=None)
    p, q = pair
    shifted = p + np.float32(shift)
    both = [to_numpy(kl(tensor(r), tensor(q))) for r in (p, shifted)]
    # The shift itself moves logits by up to 200 ULP, and KL by up to 2 + D times that,
    # where D <= 200 + log(4) is the largest log(p / q).
    atol = 2 * rounding(shifted.astype("float64"), q, 4) + 204 * 200 * ULP
    np.testing.assert_allclose(*both, rtol=0, atol=atol)


# The other divergences.


def test_bernoulli_from_logits_equals_the_reference() -> None:
    p, q = logits(0, (30, 4)), logits(1, (30, 4))
    kl = BernoulliKL(from_logits=True, reduction=None)(tensor(p), tensor(q))
    np.testing.assert_allclose(
        to_numpy(kl), bernoulli(p, q), rtol=0, atol=rounding(p, q, 2)
    )


def test_bernoulli_from_probabilities_equals_the_reference() -> None:
    p, q = (1 / (1 + np.exp(-logits(s, (30, 4)))) for s in (0, 1))
    p, q = p.astype("float32"), q.astype("float32")
    kl = BernoulliKL(reduction=None)(tensor(p), tensor(q))
    # The logits of exactly these float32 numbers.
    p, q = (
        np.log(r.astype("float64")) - np.log1p(-r.astype("float64")) for r in (p, q)
    )
    atol = 2 * rounding(p, q, 2)
    np.testing.assert_allclose(to_numpy(kl), bernoulli(p, q), rtol=0, atol=atol)


def test_bernoulli_of_huge_logits() -> None:
    kl = BernoulliKL(from_logits=True)
    p, q = np.array([[1e4, -1e4]]), np.array([[-1e4, -1e4]])
    # 1e4 for the first label, 0 for the second: their mean.
    assert float(kl(tensor(p), tensor(q))) == 5e3
    by_p, by_q = gradients(kl, p, q)
    np.testing.assert_array_equal(by_p, 0.0)
    np.testing.assert_array_equal(by_q, [[-0.5, 0.0]])


def test_bernoulli_of_certain_probabilities() -> None:
    kl = BernoulliKL()
    p, q = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    # About -log(1e-7) = 16.1; 1 - 1e-7 is 1 - 2^-23 in float32, of logarithm -15.9.
    assert 15.9 < float(kl(tensor(p), tensor(q))) < 16.2
    for gradient in gradients(kl, p, q):
        assert np.all(np.isfinite(gradient))


def test_bernoulli_gradients_equal_their_closed_forms() -> None:
    z, z_perturbed = logits(0, (6, 5)), logits(1, (6, 5))
    p, q = (1 / (1 + np.exp(-r)) for r in (z, z_perturbed))
    by_p, by_q = gradients(
        BernoulliKL(from_logits=True, reduction="sum"), z, z_perturbed
    )
    atol = 3 * rounding(z, z_perturbed, 2)
    expected = p * (1 - p) * (z - z_perturbed) / 5
    np.testing.assert_allclose(by_p, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(by_q, (q - p) / 5, rtol=0, atol=atol)


def test_gaussian_equals_the_reference() -> None:
    f, g = logits(0, (30, 4)), logits(1, (30, 4))
    kl = GaussianKL(stddev=0.7, reduction=None)(tensor(f), tensor(g))
    expected = np.mean((f - g) ** 2, axis=-1) / (2 * 0.7**2)
    # A difference, a division, a square and a mean of 4: all of one sign.
    np.testing.assert_allclose(to_numpy(kl), expected, rtol=12 * ULP)


def test_gaussian_gradients_oppose_each_other() -> None:
    f, g = logits(0, (30, 4)), logits(1, (30, 4))
    by_f, by_g = gradients(GaussianKL(stddev=0.7, reduction="sum"), f, g)
    np.testing.assert_array_equal(by_f, -by_g)
    np.testing.assert_allclose(by_f, (f - g) / (4 * 0.7**2), rtol=12 * ULP)


@pytest.mark.parametrize("stddev", [0, -1.0, math.inf])
def test_stddev_must_be_positive(stddev: float) -> None:
    with pytest.raises(ValueError, match=r"`stddev` must be .*Received: stddev="):
        GaussianKL(stddev)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "divergence",
    [CategoricalKL(True), BernoulliKL(True), GaussianKL()],
    ids=lambda d: d.name,
)
def test_half_precision_outputs(divergence: Divergence, dtype: str) -> None:
    # The square of the largest difference, 3.6e5, is beyond float16.
    p, q = (tensor(logits(s, (8, 4), 100.0), dtype) for s in (0, 1))
    p = ops.where(p == ops.max(p), ops.cast(600, dtype), p)
    value = divergence(p, q)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    assert math.isfinite(float(value))
    expected = divergence(ops.cast(p, "float32"), ops.cast(q, "float32"))
    assert float(value) == float(expected)


# Reductions, sample weights and masks act as on the loss.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (2, 3, 5, 4)])
def test_reductions_and_sample_weights(shape: tuple[int, ...], reduction: str) -> None:
    p, q = logits(0, shape), logits(1, shape)
    weights = np.random.default_rng(2).uniform(size=shape[:-1])
    weights[0] = 0.0
    kl = CategoricalKL(from_logits=True, reduction=reduction)
    values = weights * categorical(log_softmax(p), log_softmax(q))
    expected = values.sum() if reduction == "sum" else values.mean()
    # All values are positive: relative rounding of the sum, and that of each value.
    atol = rounding(p, q, 4) * (values.size if reduction == "sum" else 1)
    assert float(kl(tensor(p), tensor(q), tensor(weights))) == pytest.approx(
        expected, rel=(values.size + 4) * ULP, abs=atol
    )


def test_a_weight_of_zero_removes_a_sample() -> None:
    p, q = logits(0, (3, 4)), logits(1, (3, 4))
    q[2] = -1e6 * q[2]
    weights = tensor([1.0, 1.0, 0.0])
    kl = CategoricalKL(from_logits=True, reduction="sum")
    kept = float(kl(tensor(p[:2]), tensor(q[:2])))
    assert float(kl(tensor(p), tensor(q), weights)) == pytest.approx(kept, rel=4 * ULP)
    for gradient in gradients(lambda a, b: kl(a, b, weights), p, q):
        np.testing.assert_array_equal(gradient[2], 0.0)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "mean_with_sample_weight"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_masks_and_weights_act_as_on_the_loss(
    weighted: bool, masked: bool, reduction: str
) -> None:
    """With a variance of 1/2 the Gaussian divergence is the mean squared error."""
    f, g = logits(0, (5, 6, 3)), tensor(logits(1, (5, 6, 3)))
    rng = np.random.default_rng(2)
    weights = rng.uniform(size=(5, 6)).astype("float32") if weighted else None
    if masked:
        set_keras_mask(g, ops.convert_to_tensor(rng.uniform(size=(5, 6)) > 0.4))
    kl = GaussianKL(stddev=math.sqrt(0.5), reduction=reduction)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    expected = float(loss(tensor(f), g, copied(weights)))
    assert expected > 0
    # sqrt(2) * sqrt(0.5) is rounded: two numbers, a quotient, a square; all positive.
    value = float(kl(tensor(f), g, copied(weights)))
    assert value == pytest.approx(expected, rel=40 * ULP)


def test_masked_positions_do_not_count() -> None:
    p, q = logits(0, (2, 3, 4)), logits(1, (2, 3, 4))
    mask = np.array([[True, True, False], [True, False, False]])
    perturbed = tensor(q)
    set_keras_mask(perturbed, ops.convert_to_tensor(mask))
    value = float(CategoricalKL(from_logits=True)(tensor(p), perturbed))
    expected = np.mean(categorical(log_softmax(p[mask]), log_softmax(q[mask])))
    assert value == pytest.approx(expected, rel=20 * ULP, abs=rounding(p, q, 4))


# A user's own, and configuration.


def test_a_users_divergence() -> None:
    class Distance(Divergence):
        def call(self, outputs: Any, perturbed_outputs: Any) -> Any:
            return ops.mean(ops.abs(outputs - perturbed_outputs), axis=-1)

    value = Distance(reduction="sum")(tensor([[1.0, 2.0]]), tensor([[2.0, 4.0]]))
    assert float(value) == 1.5


def test_a_users_divergence_may_have_an_attribute_axis() -> None:
    class Distance(Divergence):
        axis = (1, 2)

        def call(self, outputs: Any, perturbed_outputs: Any) -> Any:
            return ops.mean(ops.abs(outputs - perturbed_outputs), axis=self.axis)

    assert float(Distance()(tensor([[[1.0, 2.0]]]), tensor([[[2.0, 4.0]]]))) == 1.5


def test_base_class_asks_for_call() -> None:
    with pytest.raises(NotImplementedError, match=r"Divergence must implement call"):
        Divergence()(tensor([[1.0]]), tensor([[1.0]]))


@pytest.mark.parametrize(
    "divergence",
    [
        CategoricalKL(True, 1, reduction="sum", name="mine"),
        BernoulliKL(True, 2),
        GaussianKL(2.5, reduction="sum"),
    ],
    ids=lambda d: type(d).__name__,
)
def test_serialization_round_trip(divergence: Divergence) -> None:
    config = keras.saving.serialize_keras_object(divergence)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(divergence)
    assert copy.get_config() == divergence.get_config()


@pytest.mark.only_tensorflow
def test_ragged_outputs_are_named() -> None:
    import tensorflow as tf

    ragged = tf.ragged.constant([[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]])
    with pytest.raises(ValueError, match="must be dense tensors for a divergence"):
        GaussianKL()(ragged, ragged)
