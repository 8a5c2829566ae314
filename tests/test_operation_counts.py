"""A step multiplies, reads and writes no more than its passes through the network."""

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from tests.benchmarks.memory import lowered_step
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.operation_counts import num_eager_operations
from tests.support.operation_counts import product_flops

# Products of the network's layers for a sample: 4 x 4 places x 4 filters of 9 weights,
# then kernels of 64 x 8 and 8 x 3.
CONVOLUTION, *DENSE = 4 * 4 * 4 * 9, 64 * 8, 8 * 3
FORWARD = CONVOLUTION + sum(DENSE)
# Gradients are those of each kernel and input; of the images, which need none, in
# TensorFlow's graph alone, until it is pruned.
STEP = 3 * FORWARD - CONVOLUTION * (keras.config.backend() != "tensorflow")


@cache
def plain() -> int:
    return product_flops(cnn(), *image_data(32))


def ratio(**options: Any) -> float:
    """Operations of a step over those of plain Keras's."""
    return product_flops(keras_nrs.wrap(cnn(), **options), *image_data(32)) / plain()


def test_it_counts_what_is_known_of_a_dense_layer() -> None:
    """Forward and the kernel's gradient: two products."""
    x, y = image_data(8)
    model = keras.Sequential([keras.Input(x.shape[1:])])
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert product_flops(model, x, y) == 2 * (2 * x.size * 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *rest(
            {"scheme": "sam"},
            {"perturbation": "filterwise"},
            {"perturbations_per_replica": 2, "antithetic": True},
            {"scheme": "asam"},
        ),
    ],
)
def test_two_passes_multiply_twice(options: dict[str, Any]) -> None:
    assert ratio(**options) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("options", [{}, *rest({"perturbations_per_replica": 2})])
def test_rpr_multiplies_as_plain_keras(options: dict[str, Any]) -> None:
    assert ratio(scheme="rpr", **options) == pytest.approx(1, abs=1e-9)


@pytest.mark.matrix
def test_a_clean_pass_of_rpr_has_no_gradient() -> None:
    expected = 1 + FORWARD / STEP
    assert ratio(scheme="rpr", clean_pass=True) == pytest.approx(expected, abs=1e-9)


@pytest.mark.matrix
def test_a_recomputed_pass_is_one_forward_pass_more() -> None:
    """At most: the outputs of the last layer need not be there again."""
    found = STEP * (ratio(memory_efficient=True) - 2)
    assert FORWARD - DENSE[-1] - 1e-6 <= found <= FORWARD + 1e-6


@pytest.mark.matrix
def test_half_of_the_samples_cost_half_a_pass() -> None:
    assert ratio(perturbed_fraction=0.5) == pytest.approx(1.5, abs=1e-9)


def accesses(**options: Any) -> float:
    """Reads and writes of each weight in a step of JAX, as its compiler counts them."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)])
    model.compile("sgd", "mse")
    x = np.zeros((2, 512), "float32")
    model.train_on_batch(x, x)
    trained = keras_nrs.wrap(model, **options) if options else model
    analysis = lowered_step(trained, x, x).compile().cost_analysis()
    return float(analysis["bytes accessed"]) / (4 * model.count_params())


@pytest.mark.only_jax
@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        # The noise is written, and read for its norm. theta is read for its own norm;
        # both are read for their sum, which is written.
        ("rpr", 6),
        # The same, a pass forward and its gradient, and the sum of two gradients.
        ("nrs", 6 + 3),
        # The gradient is read for its norm; the sum is as above, and so is the pass.
        ("sam", 1 + 3 + 2),
    ],
)
def test_accesses_of_each_weight_above_a_plain_step(scheme: str, expected: int) -> None:
    import jax

    if jax.__version_info__ < (0, 10):
        pytest.skip("JAX 0.7 fuses less: 12, 15 and 9.")
    assert accesses(scheme=scheme) - accesses() == pytest.approx(expected, abs=0.2)


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("options", "num_passes", "expected"),
    [
        ({}, 2, 5),
        ({"scheme": "rpr"}, 1, 5),
        ({"scheme": "sam"}, 2, 6),
        ({"scheme": "asam"}, 2, 8),
    ],
)
def test_a_weight_more_takes_few_operations(
    options: dict[str, Any], num_passes: int, expected: int
) -> None:
    """On a GPU each one takes longer to start than to run."""

    def count(depth: int, *, is_wrapped: bool) -> int:
        stack = [keras.layers.Dense(4) for _ in range(depth)]
        model = keras.Sequential([keras.Input((4,)), *stack])
        model.compile("sgd", "mse")
        if is_wrapped:
            model = keras_nrs.wrap(model, **options)
        return num_eager_operations(model, np.ones((2, 4)), np.ones((2, 4)))

    def per_weight(*, is_wrapped: bool) -> float:
        added = count(8, is_wrapped=is_wrapped) - count(4, is_wrapped=is_wrapped)
        return added / 8

    found = per_weight(is_wrapped=True) - num_passes * per_weight(is_wrapped=False)
    assert found <= expected
