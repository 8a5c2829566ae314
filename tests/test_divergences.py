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
from keras_nrs.step import output_divergences
from tests.support.divergences import ULP
from tests.support.divergences import bernoulli
from tests.support.divergences import categorical
from tests.support.divergences import log_softmax
from tests.support.divergences import logits
from tests.support.divergences import rounding
from tests.support.gradients import value_and_gradients

BACKEND = keras.config.backend()
REDUCTIONS = ("sum", "sum_over_batch_size")


def tensor(array: Any, dtype: str = "float32") -> Any:
    return ops.convert_to_tensor(array, dtype=dtype)


def to_numpy(value: Any) -> np.ndarray:
    return ops.convert_to_numpy(value).astype("float64")


def gradients(function: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
    tensors = [tensor(array) for array in arrays]
    return [g.astype("float64") for g in value_and_gradients(function, tensors)[1]]


def copied(weights: np.ndarray | None) -> np.ndarray | None:
    """On torch Keras multiplies sample weights by the mask in place."""
    return None if weights is None else weights.copy()


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


# divergence="auto".

LOGITS = keras.KerasTensor((None, 5))
CHOICES = {
    "categorical_crossentropy": CategoricalKL,
    "sparse_categorical_crossentropy": CategoricalKL,
    "categorical_focal_crossentropy": CategoricalKL,
    "kl_divergence": CategoricalKL,
    "binary_crossentropy": BernoulliKL,
    "binary_focal_crossentropy": BernoulliKL,
    "mean_squared_error": GaussianKL,
    "mean_absolute_error": GaussianKL,
    "mean_absolute_percentage_error": GaussianKL,
    "mean_squared_logarithmic_error": GaussianKL,
    "huber": GaussianKL,
    "log_cosh": GaussianKL,
}
INSTANCES = [
    (keras.losses.CategoricalCrossentropy, CategoricalKL),
    (keras.losses.SparseCategoricalCrossentropy, CategoricalKL),
    (keras.losses.CategoricalFocalCrossentropy, CategoricalKL),
    (keras.losses.KLDivergence, CategoricalKL),
    (keras.losses.BinaryCrossentropy, BernoulliKL),
    (keras.losses.BinaryFocalCrossentropy, BernoulliKL),
    (keras.losses.MeanSquaredError, GaussianKL),
    (keras.losses.MeanAbsoluteError, GaussianKL),
    (keras.losses.MeanAbsolutePercentageError, GaussianKL),
    (keras.losses.MeanSquaredLogarithmicError, GaussianKL),
    (keras.losses.Huber, GaussianKL),
    (keras.losses.LogCosh, GaussianKL),
]


@pytest.mark.parametrize(("name", "expected"), CHOICES.items())
def test_choice_for_a_function(name: str, expected: type[Divergence]) -> None:
    chosen = output_divergences.for_loss(keras.losses.get(name), LOGITS)
    assert type(chosen) is expected
    assert not getattr(chosen, "from_logits", False)
    assert chosen.reduction == "sum_over_batch_size"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("loss", "expected"), INSTANCES)
def test_choice_for_an_instance(
    loss: type[keras.losses.Loss], expected: type[Divergence], reduction: str
) -> None:
    chosen = output_divergences.for_loss(loss(reduction=reduction), LOGITS)
    assert type(chosen) is expected
    assert not getattr(chosen, "from_logits", False)
    assert chosen.reduction == reduction


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.CategoricalCrossentropy,
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.CategoricalFocalCrossentropy,
        keras.losses.BinaryCrossentropy,
        keras.losses.BinaryFocalCrossentropy,
    ],
)
def test_choice_follows_from_logits_and_axis(loss: type[keras.losses.Loss]) -> None:
    chosen: Any = output_divergences.for_loss(loss(from_logits=True, axis=1), LOGITS)
    assert chosen.from_logits
    assert chosen.axis == 1


def test_choice_for_a_subclass_of_a_loss() -> None:
    class Smooth(keras.losses.CategoricalCrossentropy):
        pass

    chosen: Any = output_divergences.for_loss(Smooth(from_logits=True), LOGITS)
    assert type(chosen) is CategoricalKL
    assert chosen.from_logits


def my_loss(y_true: Any, y_pred: Any) -> Any:
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


class MyLoss(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return my_loss(y_true, y_pred)


@pytest.mark.parametrize(
    ("loss", "name"),
    [(my_loss, "my_loss"), (MyLoss(), "MyLoss"), (keras.losses.Poisson(), "poisson")],
)
def test_unknown_loss_is_named(loss: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"loss '{name}'.*GaussianKL"):
        output_divergences.for_loss(loss, LOGITS)


def output_of(*layers: keras.layers.Layer) -> Any:
    return keras.Sequential([keras.Input((5,)), *layers]).outputs[0]


@pytest.mark.parametrize("loss", [my_loss, MyLoss(reduction="sum")])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([keras.layers.Dense(3, activation="softmax")], CategoricalKL),
        ([keras.layers.Dense(3), keras.layers.Softmax()], CategoricalKL),
        ([keras.layers.Dense(3), keras.layers.Activation("softmax")], CategoricalKL),
        ([keras.layers.Dense(3, activation="sigmoid")], BernoulliKL),
    ],
)
def test_choice_by_activation(
    loss: Any, layers: list[keras.layers.Layer], expected: type[Divergence]
) -> None:
    chosen: Any = output_divergences.for_loss(loss, output_of(*layers))
    assert type(chosen) is expected
    assert not chosen.from_logits
    assert chosen.reduction == getattr(loss, "reduction", "sum_over_batch_size")


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_choice_by_integer_labels(shape: tuple[int, ...]) -> None:
    labels = np.zeros(shape, "int32")
    chosen: Any = output_divergences.for_loss(
        my_loss, output_of(keras.layers.Dense(3)), labels
    )
    assert type(chosen) is CategoricalKL
    assert chosen.from_logits


@pytest.mark.parametrize(
    ("units", "activation", "labels"),
    [
        (3, None, np.zeros((4,))),  # Not integers.
        (3, "relu", np.zeros((4,), "int32")),  # No logits.
        (3, None, np.zeros((4, 3), "int32")),  # No indices.
        (1, None, np.zeros((4,), "int32")),  # No classes.
    ],
)
def test_other_labels_decide_nothing(
    units: int, activation: str | None, labels: np.ndarray
) -> None:
    output = output_of(keras.layers.Dense(units, activation=activation))
    with pytest.raises(ValueError, match="loss 'my_loss'"):
        output_divergences.for_loss(my_loss, output, labels)


def test_probabilities_from_an_operation_are_not_taken_for_logits() -> None:
    inputs = keras.Input((5,))
    output = ops.softmax(keras.layers.Dense(3)(inputs))
    try:
        chosen: Any = output_divergences.for_loss(my_loss, output, np.zeros(4, "int32"))
    except ValueError:
        return
    assert not chosen.from_logits


# All outputs of a model.

X = logits(3, (4, 5))


def two_outputs(as_dict: bool = False) -> keras.Model:
    inputs = keras.Input((5,))
    # Not in alphabetical order, in which dicts are flattened.
    digit = keras.layers.Dense(3, name="digit")(inputs)
    angle = keras.layers.Dense(2, name="angle")(inputs)
    outputs = {"digit": digit, "angle": angle} if as_dict else [digit, angle]
    return keras.Model(inputs, outputs)


def summary(chosen: list[output_divergences.OutputDivergence]) -> dict[Any, Any]:
    return {c.paths[0]: (type(c.divergence), c.weight) for c in chosen}


CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DIGITS, ANGLES = np.array([0, 1, 2, 1]), logits(4, (4, 2))


def test_one_output() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(loss=CROSSENTROPY)
    outputs, perturbed = model(X), tensor(logits(1, (4, 3)))
    chosen = output_divergences.for_model(model, "auto", outputs, DIGITS)
    assert summary(chosen) == {(): (CategoricalKL, None)}
    value = output_divergences.total_divergence(
        chosen, DIGITS, outputs, perturbed, None
    )
    expected = CategoricalKL(True)(outputs, perturbed)
    np.testing.assert_array_equal(to_numpy(value), to_numpy(expected))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("targets", [None, [DIGITS, ANGLES]])
def test_list_of_outputs(targets: Any, trained: bool) -> None:
    model = two_outputs()
    model.compile(loss=[CROSSENTROPY, "mse"], loss_weights=[2.0, 0.5])
    if trained:
        model.evaluate(X, [DIGITS, ANGLES], verbose=0)
    chosen = output_divergences.for_model(model, "auto", model(X), targets)
    assert summary(chosen) == {(0,): (CategoricalKL, 2.0), (1,): (GaussianKL, 0.5)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_dict_of_losses(as_dict: bool) -> None:
    model = two_outputs(as_dict)
    model.compile(
        loss={"angle": "mse", "digit": CROSSENTROPY},
        loss_weights={"angle": 0.5, "digit": 2.0},
    )
    outputs = model(X)
    chosen = output_divergences.for_model(model, "auto", outputs)
    digit, angle = (("digit",), ("angle",)) if as_dict else ((0,), (1,))
    assert summary(chosen) == {digit: (CategoricalKL, 2.0), angle: (GaussianKL, 0.5)}

    perturbed = keras.tree.map_structure(lambda y: 2 * y, outputs)
    weights = {"digit": np.array([1.0, 0.0, 0.0, 2.0]), "angle": np.ones(4)}
    if not as_dict:
        weights = [weights["digit"], weights["angle"]]
    value = output_divergences.total_divergence(
        chosen, None, outputs, perturbed, weights
    )
    parts = [
        CategoricalKL(True)(
            outputs[digit[0]],
            perturbed[digit[0]],
            tensor([1.0, 0.0, 0.0, 2.0]),
        ),
        GaussianKL()(outputs[angle[0]], perturbed[angle[0]]),
    ]
    expected = 2.0 * to_numpy(parts[0]) + 0.5 * to_numpy(parts[1])
    np.testing.assert_allclose(to_numpy(value), expected, rtol=4 * ULP)


def test_dict_of_targets_for_a_list_of_outputs() -> None:
    model = two_outputs()
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    targets = {"angle": ANGLES, "digit": DIGITS}
    assert model.evaluate(X, targets, verbose=0)  # Keras takes them.
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    chosen = output_divergences.for_model(model, "auto", model(X), targets)
    assert summary(chosen) == {(0,): (CategoricalKL, None), (1,): (GaussianKL, None)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_an_output_without_a_loss_does_not_count(as_dict: bool) -> None:
    model = two_outputs(as_dict)
    model.compile(loss={"digit": CROSSENTROPY} if as_dict else [CROSSENTROPY, None])
    chosen = output_divergences.for_model(model, "auto", model(X))
    path = ("digit",) if as_dict else (0,)
    assert summary(chosen) == {path: (CategoricalKL, None)}


def test_activations_are_found_through_the_model() -> None:
    inputs = keras.Input((5,))
    outputs = {
        "b": keras.layers.Dense(3, activation="softmax")(inputs),
        "a": keras.layers.Dense(2, activation="sigmoid")(inputs),
    }
    model = keras.Model(inputs, outputs)
    model.compile(loss={"a": my_loss, "b": my_loss})
    chosen = output_divergences.for_model(model, "auto", model(X))
    assert summary(chosen) == {
        ("a",): (BernoulliKL, None),
        ("b",): (CategoricalKL, None),
    }


def test_one_divergence_for_all_outputs() -> None:
    model = two_outputs()
    model.compile(loss=[CROSSENTROPY, "mse"])
    mine = GaussianKL(3.0)
    chosen = output_divergences.for_model(model, mine, model(X))
    assert [c.divergence for c in chosen] == [mine, mine]


def test_a_model_without_a_loss() -> None:
    model = two_outputs()
    mine = GaussianKL(3.0)
    chosen = output_divergences.for_model(model, mine, model(X))
    assert [(c.paths[0], c.divergence) for c in chosen] == [((0,), mine), ((1,), mine)]
    with pytest.raises(ValueError, match=r"compiled with a loss.*compile\(loss="):
        output_divergences.for_model(model, "auto", model(X))


def test_list_of_divergences() -> None:
    model = two_outputs()
    model.compile(loss=["mse", "mse"])
    chosen = output_divergences.for_model(model, [CategoricalKL(True), None], model(X))
    assert summary(chosen) == {(0,): (CategoricalKL, None)}


def test_dict_of_divergences() -> None:
    model = two_outputs(as_dict=True)
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    given = {"digit": CategoricalKL(True), "angle": GaussianKL(2.0)}
    chosen = output_divergences.for_model(model, given, model(X))
    assert {c.paths[0][0]: c.divergence for c in chosen} == given
    chosen = output_divergences.for_model(model, {"digit": given["digit"]}, model(X))
    assert {c.paths[0][0]: c.divergence for c in chosen} == {"digit": given["digit"]}


def test_dict_of_divergences_for_a_list_of_outputs() -> None:
    """By the names of the outputs, as losses are: not in alphabetical order."""
    model = two_outputs()
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    given = {"digit": CategoricalKL(True), "angle": GaussianKL(2.0)}
    chosen = output_divergences.for_model(model, given, model(X))
    assert summary(chosen) == {(0,): (CategoricalKL, None), (1,): (GaussianKL, None)}


def test_a_divergence_for_an_unknown_output() -> None:
    model = two_outputs(as_dict=True)
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    with pytest.raises(ValueError, match=r"digits"):
        output_divergences.for_model(model, {"digits": CategoricalKL(True)}, model(X))


def test_wrong_number_of_divergences() -> None:
    model = two_outputs()
    model.compile(loss=["mse", "mse"])
    with pytest.raises(ValueError, match=r"model's 2 outputs. Received: divergence="):
        output_divergences.for_model(model, [GaussianKL()] * 3, model(X))


@pytest.mark.parametrize(
    "divergence", ["kl", None, 3, [], ["auto"], [None], GaussianKL]
)
def test_what_cannot_be_a_divergence(divergence: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto'.*Received: divergence="):
        output_divergences.check_divergence(divergence)


@pytest.mark.parametrize(
    "divergence", ["auto", GaussianKL(), [GaussianKL(), None], {"a": GaussianKL()}]
)
def test_what_can_be_a_divergence(divergence: Any) -> None:
    assert output_divergences.check_divergence(divergence) is divergence


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 3, 4)])
def test_ignored_classes_do_not_count(
    shape: tuple[int, ...], reduction: str, masked: bool, weighted: bool
) -> None:
    """Weighted as in the loss: it is log(3) at each position of equal logits."""
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=1, reduction=reduction
    )
    positions = shape[:-1] if shape[-1] == 1 else shape
    model = keras.Sequential([keras.Input((*positions[1:], 5)), keras.layers.Dense(3)])
    model.compile(loss=loss)
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=shape)
    weights = rng.uniform(size=positions) if weighted else None  # Float64: copied.
    # The same at every position, so that the loss tells what counts.
    p, q = (np.tile(logits(s, (3,)), (*positions, 1)) for s in (0, 1))
    perturbed, equal = tensor(q), tensor(np.zeros_like(q))
    if masked:
        mask = ops.convert_to_tensor(rng.uniform(size=positions) > 0.3)
        set_keras_mask(perturbed, mask)
        set_keras_mask(equal, mask)
    chosen = output_divergences.for_model(model, "auto", tensor(p), labels)
    value = float(
        output_divergences.total_divergence(
            chosen, labels, tensor(p), perturbed, weights
        )
    )
    counted = float(loss(labels, equal, weights)) / math.log(3)
    expected = counted * float(categorical(log_softmax(p), log_softmax(q)).flat[0])
    # Sums of up to 24 positive numbers on both sides.
    atol = max(counted, 1) * rounding(p, q, 3)
    assert value == pytest.approx(expected, rel=100 * ULP, abs=atol)
