"""The cheap steps: their objectives against those of whole batches."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs.divergences import CategoricalKL
from studies import training
from studies.arms import ARMS
from studies.cheap_steps import CHEAP_STEP_TASKS
from studies.cheap_steps import AveragedReference
from studies.cheap_steps import CheapStep
from studies.cheap_steps import SharedOut
from studies.cheap_steps import with_cheap_step
from studies.tasks import TASKS

pytestmark = pytest.mark.only_jax  # The steps are JAX's.

LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)
CHEAP = [name for name, arm in ARMS.items() if arm.tasks]
N = 4


class Doubling(keras_nrs.perturbations.Perturbation):
    """delta is eps times the weights."""

    def sample(self, weights: Sequence[Any], eps: Any, rng: Any) -> list[Any]:
        return [eps * w for w in weights]


@pytest.fixture
def network() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])


@pytest.fixture
def batch(rng: np.random.Generator) -> tuple[Any, Any]:
    x = rng.normal(size=(N, 3)).astype("float32")
    return x, np.eye(5, dtype="float32")[rng.integers(5, size=N)]


def values(variables: Sequence[Any]) -> list[Any]:
    return [v.value for v in variables]


def step_of(kind: type[CheapStep], network: keras.Model, **arguments: Any) -> CheapStep:
    step = kind(network, perturbation=Doubling(), **arguments)
    step.compile("sgd", LOSS)
    return step


def total_of(step: CheapStep, weights: Any, state: Any, x: Any, y: Any) -> Any:
    return step.compute_loss_and_updates(weights, state, [], x, y, None, training=True)


def total_and_gradients(step: CheapStep, x: Any, y: Any) -> tuple[Any, list[Any]]:
    import jax

    state = values(step.non_trainable_variables)
    total, gradients = jax.value_and_grad(lambda w: total_of(step, w, state, x, y)[0])(
        values(step.trainable_variables)
    )
    return total, gradients


def nrs(
    network: keras.Model, x: Any, y: Any, *, eps: float, alpha: float
) -> tuple[Any, list[Any]]:
    """Equation 3 on a whole batch, normalized, and its gradients."""
    import jax

    def total(weights: list[Any]) -> Any:
        deltas = [jax.lax.stop_gradient(eps * w) for w in weights]
        perturbed = [w + d for w, d in zip(weights, deltas, strict=True)]
        outputs = [network.stateless_call(w, [], x)[0] for w in (weights, perturbed)]
        return keras_nrs.nrs_objective(y, *outputs, loss=LOSS, alpha=alpha).total

    return jax.value_and_grad(total)(values(network.trainable_variables))


def assert_equal(found: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> None:
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_with_all_samples_in_both_passes_it_is_nrs(
    network: keras.Model, batch: Any
) -> None:
    step = step_of(SharedOut, network, in_both_passes=1.0, eps=0.5, alpha=4.0)
    found = total_and_gradients(step, *batch)
    assert_equal(found, nrs(network, *batch, eps=0.5, alpha=4.0))


def test_without_perturbation_halves_make_the_plain_loss(
    network: keras.Model, batch: Any
) -> None:
    step = step_of(SharedOut, network, in_both_passes=0.0, eps=0.0)
    found = total_and_gradients(step, *batch)
    assert_equal(found, nrs(network, *batch, eps=0.0, alpha=0.0))


@pytest.mark.parametrize(("in_both_passes", "alpha"), [(0.0, 0.0), (0.5, 4.0)])
def test_each_way_to_share_out_has_the_mean_of_nrs(
    network: keras.Model, batch: Any, in_both_passes: float, alpha: float
) -> None:
    step = step_of(
        SharedOut, network, in_both_passes=in_both_passes, eps=0.5, alpha=alpha
    )
    x, y = batch
    orders = [list(order) for order in permutations(range(N))]
    found = [total_and_gradients(step, x[order], y[order]) for order in orders]
    totals, gradients = zip(*found, strict=True)
    means = [np.mean(of_weight, axis=0) for of_weight in zip(*gradients, strict=True)]
    assert_equal((np.mean(totals), means), nrs(network, x, y, eps=0.5, alpha=alpha))
    assert np.std(totals) > 0.01


@pytest.mark.parametrize(
    ("arm", "size", "expected"),
    [
        ("NRS, samples shared out, no divergence", 50, [25, 25]),
        ("NRS, samples shared out, no divergence", 64, [32, 32]),
        ("NRS, samples shared out", 50, [33, 33]),
        ("NRS, samples shared out", 64, [43, 43]),
    ],
)
def test_passes_run_as_many_samples_as_the_arm_costs(
    network: keras.Model,
    monkeypatch: pytest.MonkeyPatch,
    arm: str,
    size: int,
    expected: list[int],
) -> None:
    share = ARMS[arm].fixed["in_both_passes"]
    step = step_of(SharedOut, network, in_both_passes=share, eps=0.5)
    outputs, seen = step.outputs, []

    def counted(weights: Any, x: Any) -> Any:
        seen.append(len(x))
        return outputs(weights, x)

    monkeypatch.setattr(step, "outputs", counted)
    total_and_gradients(step, np.ones((size, 3)), np.eye(5)[[0] * size])
    assert seen == expected
    assert sum(seen) / size == pytest.approx(ARMS[arm].cost, abs=0.02)


def test_averaged_weights_are_the_reference(network: keras.Model, batch: Any) -> None:
    import jax

    x, y = batch
    step = step_of(
        AveragedReference, network, reference_momentum=0.9, eps=0.5, alpha=4.0
    )
    state = values(step.non_trainable_variables)
    weights = values(step.trainable_variables)
    thetas = [[(k + 1.0) * w for w in weights] for k in range(3)]
    for theta in thetas:
        grad = jax.value_and_grad(
            lambda w, state=state: total_of(step, w, state, x, y), has_aux=True
        )
        (total, (_, _, state, _)), gradients = grad(theta)
    # theta and twice and three times theta, of ages 2, 1, 0.
    shares = np.array([0.81, 0.9, 1.0]) / 2.71
    averages = [shares @ np.array([1.0, 2.0, 3.0]) * w for w in weights]
    reference = network.stateless_call(averages, [], x)[0]

    def expected(theta: list[Any]) -> Any:
        perturbed = [w + 0.5 * jax.lax.stop_gradient(w) for w in theta]
        outputs = network.stateless_call(perturbed, [], x)[0]
        kl = CategoricalKL(from_logits=True)(reference, outputs)
        return LOSS(y, outputs) + 4.0 * kl

    assert_equal((total, gradients), jax.value_and_grad(expected)(thetas[-1]))


def test_at_first_the_reference_is_the_network_itself(
    network: keras.Model, batch: Any
) -> None:
    step = step_of(
        AveragedReference, network, reference_momentum=0.99, eps=0.0, alpha=4.0
    )
    found = total_and_gradients(step, *batch)
    assert_equal(found, nrs(network, *batch, eps=0.0, alpha=0.0))


@pytest.mark.parametrize("arm", CHEAP)
@pytest.mark.parametrize("name", CHEAP_STEP_TASKS)
def test_each_arm_trains_with_a_new_delta_at_each_step(
    arm: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"train": 60, "validation": 40, "epochs": 2, "batch_size": 20}
    task = replace(TASKS[name], data="smoke", network="cnn", **sizes)
    settings = {"learning_rate": 1e-3, "weight_decay": 3e-3}
    settings = ARMS[arm].candidates(task, settings)[-1]
    steps: list[CheapStep] = []
    make = training.with_cheap_step

    def kept(*arguments: Any) -> Any:
        steps.append(make(*arguments))
        return steps[0]

    monkeypatch.setattr(training, "with_cheap_step", kept)
    network, _, measured = training.train(task, settings, 0)
    before = task.network_of(0).get_weights()
    for new, old in zip(network.get_weights(), before, strict=True):
        assert np.isfinite(new).all()
        assert (new != old).any()
    assert measured["last_loss"] > 0
    # The state of the seed counts draws: one in each of 6 steps.
    assert int(steps[0].seed_generator.state[1]) == 6


@pytest.mark.parametrize("arm", CHEAP)
def test_other_tasks_and_backends_are_refused(
    arm: str, network: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ARMS[arm].candidates(TASKS["smoke"], {})[0]
    with pytest.raises(ValueError, match="Received: the task 'smoke' on jax"):
        with_cheap_step(network, "smoke", settings)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    task = CHEAP_STEP_TASKS[0]
    with pytest.raises(ValueError, match=f"the task '{task}' on torch"):
        with_cheap_step(network, task, settings)
