"""What a model does with a perturbation: which weights it gets, and what is added."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_nrs import perturbations
from keras_nrs.backend import RandomStream
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations import Perturbation
from keras_nrs.perturbations import RelativeBall
from tests.support.perturbations import NORM_RTOL
from tests.support.perturbations import norm
from tests.support.perturbations import to_numpy
from tests.support.perturbations import weights_like
from tests.support.statistics import key

BACKEND = keras.config.backend()


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


def model_of(variables: list[Any]) -> keras.Model:
    """A model with these trainable variables."""
    model = keras.Model()
    model.held = variables
    assert list(map(id, model.trainable_variables)) == list(map(id, variables))
    return model


def sample_deltas(perturbation: Perturbation, variables: list[Any]) -> list[Any]:
    model, values = model_of(variables), [v.value for v in variables]
    return perturbations.sample_deltas(perturbation, model, values, 0.1, key(0))


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


@pytest.mark.parametrize("where", [lambda v: True, "kernels"])
def test_integer_variables_are_never_perturbed(where: Any) -> None:
    count = keras.Variable(np.ones((3, 2)), dtype="int32", trainable=False)
    assert not Ball(where=where).selects(count)


@pytest.mark.only_torch
def test_kernels_are_all_but_biases_and_normalization() -> None:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(7, 4)(inputs)
    x = layers.MultiHeadAttention(2, 2)(x, x)
    x = layers.LayerNormalization(axis=(1, 2))(x)
    x = layers.PReLU()(layers.GRU(3, return_sequences=True)(x))
    x = layers.BatchNormalization()(layers.SeparableConv1D(4, 2)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    ball = FilterwiseBall(where="kernels")
    values = [v.value for v in model.trainable_variables]
    deltas = perturbations.sample_deltas(ball, model, values, 0.1, key(0))
    names = {
        v.name
        for v, delta in zip(model.trainable_variables, deltas, strict=True)
        if delta is not None
    }
    kernels = {"kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel"}
    assert names == kernels | {"embeddings"}


@pytest.mark.parametrize(("where", "error"), [("kernel", ValueError), (3, TypeError)])
def test_what_where_may_be(where: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"None, 'kernels' or.*where=lambda v") as raised:
        Ball(where=where)
    assert f"where={where!r}" in str(raised.value)


# Units.


class Units(Perturbation):
    """Remembers the units that it is told, and perturbs nothing."""

    needs_units = True

    def sample(
        self, weights: Sequence[Any], eps: Any, rng: Any, *, units: Any = None
    ) -> list[Any]:
        self.units = units
        return [ops.zeros_like(w) for w in weights]


def test_units_come_from_the_layers_of_the_selected_weights() -> None:
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2DTranspose(3, 2),
            layers.DepthwiseConv2D(2, trainable=False),
            layers.Dense(5),
        ]
    )
    values = [v.value for v in model.trainable_variables]
    for where, expected in ((None, [(2,), (), (1,), ()]), ("kernels", [(2,), (1,)])):
        perturbation = Units(where=where)
        perturbations.sample_deltas(perturbation, model, values, 0.1, key(0))
        assert perturbation.units == expected


def test_units_follow_a_model_whose_weights_change() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    perturbation = Units()

    def units() -> Any:
        values = [v.value for v in model.trainable_variables]
        perturbations.sample_deltas(perturbation, model, values, 0.1, key(0))
        return perturbation.units

    assert units() == [(1,), ()]
    model.layers[0].enable_lora(2)
    assert sorted(units()) == [(), (1,), (1,)]


# What `sample()` returns.


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
    model = model_of(variables)
    perturbations.sample_deltas(perturbation, model, values, 0.1, stream)
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
    model = model_of([variable])

    def total(value: Any) -> Any:
        deltas = perturbations.sample_deltas(
            RelativeBall(), model, [value], 0.5, key(0)
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
