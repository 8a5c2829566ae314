"""How delta is drawn: its length, its direction, and what it is added to.

Every p-value must exceed 1e-4. There are about 40 for each backend, each with a fixed
seed: a correct program had a chance below 0.5 % to need another seed.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from keras_nrs import perturbations
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import LayerwiseBall
from keras_nrs.perturbations import Perturbation
from keras_nrs.perturbations import RelativeBall
from keras_nrs.perturbations import ReleasedCode
from tests.support.arrays import ULP
from tests.support.precision import precision
from tests.support.statistics import LEVEL
from tests.support.statistics import key
from tests.support.statistics import max_correlation_p_value
from tests.support.statistics import off_diagonal

BACKEND = keras.config.backend()
CLASSES = (Ball, RelativeBall, LayerwiseBall, ReleasedCode)
NUM_SAMPLES = 10_000
SHAPES = ((3, 2), (4,), (3, 2))
SIZE = 16
# Rounding of a norm of SIZE float32 numbers, and the margin that Ball leaves.
NORM_RTOL = (SIZE + 8) * ULP + 2.0**-20


def to_numpy(tensors: Sequence[Any]) -> list[np.ndarray]:
    return [ops.convert_to_numpy(t).astype("float64") for t in tensors]


def norm(tensors: Sequence[Any]) -> float:
    return math.sqrt(sum(float(np.sum(t**2)) for t in to_numpy(tensors)))


def weights_like(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32"
) -> list[Any]:
    rng = np.random.default_rng(1)
    return [ops.convert_to_tensor(rng.normal(size=s), dtype=dtype) for s in shapes]


@functools.cache
def ball_samples(noise: str) -> dict[str, np.ndarray]:
    """10,000 flat samples of the ball of radius 2 for each distribution of lengths.

    At the steps 0 to 9,999 of one seed.
    """
    weights = [ops.zeros(shape) for shape in SHAPES]

    def draw(key: Any) -> list[Any]:
        return [
            ops.concatenate(
                [
                    ops.reshape(delta, (-1,))
                    for delta in Ball(radius=radius, noise=noise).sample(
                        weights, 2.0, key
                    )
                ]
            )
            for radius in perturbations.RADII
        ]

    steps = np.stack([np.full(NUM_SAMPLES, 7), np.arange(NUM_SAMPLES)], axis=-1)
    keys = ops.convert_to_tensor(steps, key(7).dtype)
    if BACKEND == "torch":
        samples = [ops.stack(s) for s in zip(*map(draw, keys), strict=True)]
    else:
        samples = compile_function(lambda keys: ops.map(draw, keys))(keys)
    return dict(zip(perturbations.RADII, to_numpy(samples), strict=True))


# The ball.


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("radius", perturbations.RADII)
def test_ten_thousand_samples_stay_in_the_ball(radius: str, noise: str) -> None:
    samples = ball_samples(noise)[radius]
    assert samples.shape == (NUM_SAMPLES, SIZE)
    assert np.all(np.isfinite(samples))
    assert np.max(np.linalg.norm(samples, axis=1)) <= 2.0


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("radius", perturbations.RADII)
def test_radius_follows_its_distribution(radius: str, noise: str) -> None:
    lengths = np.linalg.norm(ball_samples(noise)[radius], axis=1) / 2.0
    if radius == "sphere":
        np.testing.assert_allclose(lengths, 1.0, rtol=NORM_RTOL)
        return
    # A point uniform in a ball of R^n has a length of U^(1/n).
    uniform = lengths**SIZE if radius == "volume" else lengths
    assert scipy.stats.kstest(uniform, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("radius", perturbations.RADII)
def test_normal_direction_is_uniform_on_the_sphere(radius: str) -> None:
    samples = ball_samples("normal")[radius]
    lengths = np.linalg.norm(samples, axis=1)
    axis = np.random.default_rng(0).normal(size=SIZE)
    axis /= np.linalg.norm(axis)
    cosines = samples @ axis / lengths
    beta = scipy.stats.beta(0.5, (SIZE - 1) / 2)
    assert scipy.stats.kstest(cosines**2, beta.cdf).pvalue > LEVEL
    assert scipy.stats.binomtest(int(np.sum(cosines > 0)), NUM_SAMPLES).pvalue > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_length_and_direction_are_independent(noise: str) -> None:
    samples = ball_samples(noise)["uniform"]
    lengths = np.linalg.norm(samples, axis=1)
    directions = samples / lengths[:, None]
    rho = np.array([np.corrcoef(lengths, d)[0, 1] for d in directions.T])
    assert max_correlation_p_value(rho, NUM_SAMPLES) > LEVEL


def test_rademacher_components_are_equal_and_fair() -> None:
    samples = ball_samples("rademacher")["sphere"]
    np.testing.assert_allclose(
        np.abs(samples), 2.0 / math.sqrt(SIZE), rtol=NORM_RTOL, atol=0
    )
    num_positive = int(np.sum(samples > 0))
    assert scipy.stats.binomtest(num_positive, samples.size).pvalue > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_elements_and_successive_samples_are_uncorrelated(noise: str) -> None:
    samples = ball_samples(noise)["sphere"]
    # Includes all pairs of elements of the two leaves of equal shape.
    correlations = off_diagonal(np.corrcoef(samples.T))
    assert max_correlation_p_value(correlations, NUM_SAMPLES) > LEVEL
    successive = np.array([np.corrcoef(s[1:], s[:-1])[0, 1] for s in samples.T])
    assert max_correlation_p_value(successive, NUM_SAMPLES - 1) > LEVEL


@pytest.mark.parametrize("noise", perturbations.NOISES)
@pytest.mark.parametrize("cls", CLASSES)
def test_leaves_steps_and_seeds_are_uncorrelated(cls: Any, noise: str) -> None:
    size = 10_000
    weights = [ops.ones((100, 100)), ops.ones((100, 100))]
    perturbation = cls(radius="sphere", noise=noise)
    sample = compile_function(lambda k: perturbation.sample(weights, 1.0, k))
    leaves = [
        leaf.ravel()
        for seed in (0, 1)
        for step in range(8)
        for leaf in to_numpy(sample(key(seed, step)))
    ]
    correlations = off_diagonal(np.corrcoef(leaves))
    assert max_correlation_p_value(correlations, size) > LEVEL


@pytest.mark.parametrize("cls", CLASSES)
def test_the_same_key_gives_the_same_sample(cls: type[Perturbation]) -> None:
    weights, perturbation = weights_like(), cls()
    seeds = keras.random.SeedGenerator(3)
    samples = [
        np.concatenate([t.ravel() for t in to_numpy(perturbation.sample(*args))])
        for args in (
            (weights, 1.0, 3),
            (weights, 1.0, 3),
            (weights, 1.0, key(3)),
            (weights, 1.0, RandomStream(key(3))),
            (weights, 1.0, seeds),
            (weights, 1.0, seeds),
            (weights, 1.0, 4),
        )
    ]
    for again in samples[1:5]:
        np.testing.assert_array_equal(again, samples[0])
    assert not np.any(samples[5] == samples[0])
    assert not np.any(samples[6] == samples[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_no_perturbation_at_eps_zero(cls: type[Perturbation]) -> None:
    for delta in to_numpy(cls().sample(weights_like(), 0.0, 0)):
        np.testing.assert_array_equal(delta, 0.0)


@pytest.mark.parametrize("cls", CLASSES)
def test_eps_scales_the_sample(cls: type[Perturbation]) -> None:
    """eps may be a tensor or a variable; doubling it doubles delta exactly."""
    weights = weights_like()
    once = to_numpy(cls().sample(weights, 0.25, 0))
    for eps in (0.5, ops.convert_to_tensor(0.5), keras.Variable(0.5)):
        twice = to_numpy(cls().sample(weights, eps, 0))
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_array_equal(2 * a, b)


# The other scales.


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_relative_radius_is_a_share_of_the_norm(noise: str) -> None:
    weights = weights_like()
    delta = RelativeBall(radius="sphere", noise=noise).sample(weights, 0.3, 0)
    assert norm(delta) == pytest.approx(0.3 * norm(weights), rel=2 * NORM_RTOL)


@pytest.mark.parametrize("radius", ["uniform", "volume"])
def test_balls_share_their_noise(radius: str) -> None:
    """From one key the relative ball is the ball times the norm of the weights."""
    weights = weights_like()
    ball = to_numpy(Ball(radius=radius).sample(weights, 1.0, 5))
    relative = to_numpy(RelativeBall(radius=radius).sample(weights, 1.0, 5))
    for a, b in zip(ball, relative, strict=True):
        # atol for no element: products and a norm are all that is rounded.
        np.testing.assert_allclose(b, a * norm(weights), rtol=2 * NORM_RTOL)


@pytest.mark.parametrize("noise", perturbations.NOISES)
def test_layerwise_radius_is_a_share_of_each_norm(noise: str) -> None:
    weights = weights_like()
    deltas = LayerwiseBall(radius="sphere", noise=noise).sample(weights, 0.2, 0)
    for weight, delta in zip(weights, deltas, strict=True):
        assert norm([delta]) == pytest.approx(0.2 * norm([weight]), rel=2 * NORM_RTOL)


def test_layerwise_radius_is_drawn_for_each_variable() -> None:
    weights = [ops.ones((8,))] * 200
    deltas = LayerwiseBall(radius="uniform").sample(weights, 1.0, 0)
    lengths = np.array([norm([d]) for d in deltas]) / math.sqrt(8)
    assert scipy.stats.kstest(lengths, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("radius", perturbations.RADII)
def test_layerwise_leaves_a_zero_variable_alone(radius: str) -> None:
    weights = [ops.ones((3, 2)), ops.zeros((4,))]
    kernel, bias = to_numpy(LayerwiseBall(radius=radius).sample(weights, 0.2, 0))
    np.testing.assert_array_equal(bias, 0.0)
    assert np.all(np.isfinite(kernel)) and np.all(kernel != 0)


def test_released_delta_is_noise_over_the_norm_of_theta() -> None:
    weights = weights_like(((300, 200), (4,), (300, 200)))
    sphere, uniform = (
        to_numpy(ReleasedCode(radius=r).sample(weights, 0.1, 2))
        for r in ("sphere", "uniform")
    )
    noise = np.concatenate([a.ravel() for a in sphere]) * norm(weights) / 0.1
    assert scipy.stats.kstest(noise, "norm").pvalue > LEVEL
    # The same key gives the same noise, times one u in [0, 1) for all weights: a norm,
    # a division and two products are rounded, each of both.
    ratios = np.concatenate(
        [b[a != 0] / a[a != 0] for a, b in zip(sphere, uniform, strict=True)]
    )
    u = np.median(ratios)
    assert 0 <= u < 1
    np.testing.assert_allclose(ratios, u, rtol=16 * ULP)
    # norm(g)^2 is chi-squared: its root is sqrt(n) within 5 deviations of 1/sqrt(2).
    n = noise.size
    expected = 0.1 * math.sqrt(n) / norm(weights)
    assert norm(sphere) == pytest.approx(expected, rel=5 / math.sqrt(2 * n))


def test_released_rademacher_norm_is_exact() -> None:
    weights = weights_like()
    delta = ReleasedCode(radius="sphere", noise="rademacher").sample(weights, 0.1, 0)
    expected = 0.1 * math.sqrt(SIZE) / norm(weights)
    assert norm(delta) == pytest.approx(expected, rel=NORM_RTOL)


def test_default_radii() -> None:
    assert [cls().radius for cls in CLASSES] == ["volume"] + 3 * ["uniform"]
    assert [cls().noise for cls in CLASSES] == 4 * ["normal"]


# Dtypes.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_weights(cls: type[Perturbation], dtype: str) -> None:
    weights = weights_like(dtype=dtype)
    deltas = cls().sample(weights, 0.1, 0)
    for weight, delta, new in zip(
        weights, deltas, perturbations.add_deltas(weights, deltas), strict=True
    ):
        assert keras.backend.standardize_dtype(delta.dtype) == "float32"
        assert keras.backend.standardize_dtype(new.dtype) == dtype
        expected = ops.cast(ops.cast(weight, "float32") + delta, dtype)
        np.testing.assert_array_equal(*to_numpy([new, expected]))


def test_float16_norms_do_not_overflow() -> None:
    """norm^2 = 4e6 is beyond float16, which ends at 65504."""
    weights = [ops.full((1000,), 64.0, dtype="float16")]
    delta = RelativeBall(radius="sphere").sample(weights, 0.5, 0)
    # Pairwise or blocked sums of 1,000 squares; the margin dominates.
    assert norm(delta) == pytest.approx(0.5 * 64 * math.sqrt(1000), rel=4e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_float64_weights(cls: type[Perturbation]) -> None:
    with precision("float64"):
        weights = weights_like(dtype="float64")
        deltas = cls(radius="sphere").sample(weights, 0.3, 0)  # type: ignore[call-arg]
        for delta in deltas:
            assert keras.backend.standardize_dtype(delta.dtype) == "float64"
        if cls is RelativeBall:
            # 2^-53 for each of about SIZE roundings, and the margin, exactly.
            expected = 0.3 * norm(weights) * (1 - 2.0**-20)
            assert norm(deltas) == pytest.approx(expected, rel=1e-14)


# What a model does with it.


class Fixed(Perturbation):
    """Returns the arrays that it was given."""

    def __init__(self, deltas: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.deltas = deltas

    def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> Any:
        return self.deltas


def is_kernel(variable: Any) -> bool:
    return "kernel" in variable.name


def some_variables() -> list[Any]:
    values = {"kernel": np.ones((3, 2)), "bias": np.ones(2), "kernel_2": np.ones((2,))}
    return [keras.Variable(v, name=k, dtype="float32") for k, v in values.items()]


def sample_deltas(perturbation: Perturbation, variables: list[Any]) -> list[Any]:
    values = [v.value for v in variables]
    return perturbations.sample_deltas(perturbation, variables, values, 0.1, key(0))


def test_where_narrows_what_is_perturbed() -> None:
    variables = some_variables()
    deltas = sample_deltas(RelativeBall(radius="sphere", where=is_kernel), variables)
    assert deltas[1] is None
    perturbed = [deltas[0], deltas[2]]
    # The norm is over the perturbed weights only: 8 ones.
    assert norm(perturbed) == pytest.approx(0.1 * math.sqrt(8), rel=2 * NORM_RTOL)
    values = [v.value for v in variables]
    new = perturbations.add_deltas(values, deltas)
    assert new[1] is values[1]


def test_where_that_selects_nothing() -> None:
    with pytest.raises(ValueError, match="`where` must select at least one"):
        sample_deltas(Ball(where=lambda v: False), some_variables())


def test_integer_variables_are_never_perturbed() -> None:
    variables = [
        keras.Variable(np.ones(3), dtype="int32", trainable=False, name="count"),
        *some_variables(),
    ]
    deltas = sample_deltas(Ball(where=lambda v: True), variables)
    assert [d is None for d in deltas] == [True, False, False, False]
    assert not Ball().selects(variables[0])


def test_where_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"where='kernel'.*where=lambda v"):
        Ball(where="kernel")  # type: ignore[arg-type]


def test_a_users_arrays_are_added() -> None:
    variables = some_variables()
    arrays = [np.full(v.shape, 0.5) for v in variables]
    deltas = sample_deltas(Fixed(arrays), variables)
    new = perturbations.add_deltas([v.value for v in variables], deltas)
    for value in new:
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        np.testing.assert_array_equal(ops.convert_to_numpy(value), 1.5)


def test_a_users_sample_gets_the_selected_weights_eps_and_a_stream() -> None:
    class Recorder(Perturbation):
        def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> list[Any]:
            assert [tuple(w.shape) for w in weights] == [(3, 2), (2,)]
            assert eps == 0.1
            self.draws = [rng.normal((2,)), rng.rademacher((2,)), rng.uniform((2,))]
            return [0 * w for w in weights]

    variables = some_variables()
    perturbation = Recorder(where=is_kernel)
    values = [v.value for v in variables]
    stream = RandomStream(key(0))
    perturbations.sample_deltas(perturbation, variables, values, 0.1, stream)
    normal, signs, uniform = to_numpy(perturbation.draws)
    assert set(np.abs(signs)) == {1.0}
    assert np.all((uniform >= 0) & (uniform < 1))
    assert not np.any(np.isin(normal, uniform))


def test_wrong_number_of_deltas() -> None:
    with pytest.raises(ValueError, match=r"Fixed\.sample\(\).* 1 tensors for 3 w"):
        sample_deltas(Fixed([np.zeros((3, 2))]), some_variables())


def test_wrong_shape_of_a_delta() -> None:
    arrays = [np.zeros((3, 2)), np.zeros(3), np.zeros(2)]
    with pytest.raises(ValueError, match=r"Fixed.*\(3,\) for bias of shape \(2,\)"):
        sample_deltas(Fixed(arrays), some_variables())


@pytest.mark.parametrize("dtype", ["int32", "bfloat16"])
def test_a_users_zeros_change_no_weight(dtype: str) -> None:
    """Whatever their dtype: theta + 0 is theta."""
    variables = [keras.Variable(np.array([0.3, -0.7]), dtype="float32", name="kernel")]
    deltas = sample_deltas(Fixed([ops.zeros((2,), dtype=dtype)]), variables)
    values = [v.value for v in variables]
    (new,) = perturbations.add_deltas(values, deltas)
    np.testing.assert_array_equal(*to_numpy([new, values[0]]))


@pytest.mark.parametrize("deltas", [None, [0.0, 0.0, 0.0], [[0.0], None, [0.0]]])
def test_what_is_no_list_of_tensors_is_an_error_that_says_so(deltas: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Fixed\.sample\(\) must return"):
        sample_deltas(Fixed(deltas), some_variables())


def test_base_class_asks_for_sample() -> None:
    with pytest.raises(NotImplementedError, match=r"Perturbation must implement"):
        Perturbation().sample(weights_like(), 0.1, 0)


def test_no_gradient_flows_through_the_scale() -> None:
    """delta is a constant of the step: d sum(theta + delta) / d theta is 1."""
    variable = keras.Variable(np.full((4,), 2.0), dtype="float32", name="kernel")

    def total(value: Any) -> Any:
        deltas = perturbations.sample_deltas(
            RelativeBall(), [variable], [value], 0.5, key(0)
        )
        return ops.sum(perturbations.add_deltas([value], deltas)[0])

    value = ops.convert_to_tensor(np.full((4,), 2.0), dtype="float32")
    if BACKEND == "jax":
        import jax

        gradient = jax.grad(total)(value)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(value)
            result = total(value)
        gradient = tape.gradient(result, value)
    else:
        import torch

        value.requires_grad_(True)
        (gradient,) = torch.autograd.grad(total(value), value)
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), 1.0)


# Names and configuration.


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("ball", Ball),
        ("relative", RelativeBall),
        ("layerwise", LayerwiseBall),
        ("released", ReleasedCode),
    ],
)
def test_get_by_name(name: str, cls: type[Perturbation]) -> None:
    assert type(perturbations.get_perturbation(name)) is cls
    perturbation = cls()
    assert perturbations.get_perturbation(perturbation) is perturbation


@pytest.mark.parametrize("identifier", ["bal", None, 3, Ball])
def test_unknown_name(identifier: Any) -> None:
    with pytest.raises(ValueError, match=r"'ball', 'relative'.*Received: perturb"):
        perturbations.get_perturbation(identifier)


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_radius_and_noise(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"`radius`.*'volume'.*radius='ball'"):
        cls(radius="ball")
    with pytest.raises(ValueError, match=r"`noise`.*'rademacher'.*noise='uniform'"):
        cls(noise="uniform")


@keras.saving.register_keras_serializable(package="test_perturbations")
def registered_where(variable: Any) -> bool:
    return "kernel" in variable.name


@pytest.mark.parametrize("where", [None, registered_where])
@pytest.mark.parametrize("cls", CLASSES)
def test_serialization_round_trip(cls: Any, where: Any) -> None:
    perturbation = cls(radius="sphere", noise="rademacher", where=where)
    config = keras.saving.serialize_keras_object(perturbation)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is cls
    assert copy.where is where
    assert copy.get_config() == perturbation.get_config()
    samples = [p.sample(weights_like(), 0.1, 0) for p in (perturbation, copy)]
    for a, b in zip(*map(to_numpy, samples), strict=True):
        np.testing.assert_array_equal(a, b)
