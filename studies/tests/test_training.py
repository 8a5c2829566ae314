"""One run: what arms share, and that each arm trains."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from studies import training
from studies.arms import ARMS
from studies.networks import with_last_layer_penalty
from studies.outcomes import Forward
from studies.store import Run
from studies.tasks import TASKS
from studies.tasks import Task

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

SMOKE = TASKS["smoke"]
SHARED = {"learning_rate": 0.1, "weight_decay": 3e-3}
AVAILABLE = [
    name for name, arm in ARMS.items() if arm.is_available and arm.trains("smoke")
]


def last_settings(arm: str) -> dict[str, Any]:
    return ARMS[arm].candidates(SMOKE, SHARED)[-1]


def run(arm: str, stage: str = "choice") -> Run:
    settings = last_settings(arm)
    return Run(task="smoke", arm=arm, stage=stage, settings=settings, seed=0)


@pytest.mark.parametrize("arm", AVAILABLE)
def test_each_arm_trains_without_a_test_sample(
    arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "test_data", lambda self: pytest.fail("test samples"))
    measured = training.perform(run(arm))
    for name in ("validation_accuracy", "validation_loss", "train_loss"):
        assert math.isfinite(measured[name])
    assert not any(name.startswith("accuracy") for name in measured)


def test_a_test_run_has_all_outcomes() -> None:
    measured = training.perform(run("baseline", "test"))
    names = ("accuracy", "loss", "calibration_error", "corrupted", "rounded_2_filter")
    for name in (*names, "best_epoch_accuracy", "cpu_seconds_per_step", "eigenvalue"):
        assert name in measured


def test_arms_share_samples_initial_weights_and_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    class History:
        history: dict[str, Any] = {}

    def fit(self: Any, batches: Any, **kwargs: Any) -> Any:
        is_wrapped = isinstance(self, keras_nrs.NRSModel)
        base = keras_nrs.unwrap(self) if is_wrapped else self
        # Of the first of two calls, where a training begins without perturbations.
        seen.setdefault(arm, [*base.get_weights(), *next(batches), *next(batches)])
        return History

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(keras_nrs.NRSModel, "fit", fit)
    for arm in AVAILABLE:
        training.train(SMOKE, last_settings(arm), seed=0)
    for others in seen.values():
        for first, other in zip(seen["baseline"], others, strict=True):
            np.testing.assert_array_equal(first, other)


def test_a_failed_run_is_at_chance() -> None:
    network = SMOKE.network_of(0)
    network.set_weights([w + np.nan for w in network.get_weights()])
    found = training.quality(Forward(network), SMOKE.test_data())
    chance = {"accuracy": 0.1, "loss": math.log(10), "failed": True}
    assert found == pytest.approx(chance)


def test_the_best_epoch_is_kept() -> None:
    network = SMOKE.network_of(0)
    best = training.BestEpoch(network)
    for value, accuracy in enumerate((0.3, 0.5, 0.4)):
        network.set_weights([0 * w + value for w in network.get_weights()])
        best.on_epoch_end(value, {"val_accuracy": accuracy})
    assert all((w == 1).all() for w in best.weights)


def test_weights_are_averaged_over_the_last_epochs() -> None:
    network = SMOKE.network_of(0)
    x = SMOKE.training_data(0)[0].x
    average = training.EpochAverage(network, 2, x, batch_size=20)
    for epoch in range(5):
        network.set_weights([0 * w + epoch for w in network.get_weights()])
        average.on_epoch_end(epoch)
    average.on_train_end()
    assert all((w == 3).all() for w in network.get_weights())


def test_the_learning_rate_stays_where_weights_are_averaged() -> None:
    settings = SHARED | {"averaged_from": 0.5, "averaged_rate": 0.2}
    rate = training.optimizer_of(SMOKE, settings, steps=100)._learning_rate
    found = [float(rate(step)) for step in (0, 25, 50, 100)]
    assert found == pytest.approx([0.1, 0.06, 0.02, 0.02])


def test_the_penalty_of_the_last_layer_is_in_the_loss_alone() -> None:
    network = SMOKE.network_of(0)
    (*_, features, last), x = network.layers, SMOKE.test_data().x[:8]
    penalized = with_last_layer_penalty(network, 0.5)
    outputs = keras.ops.convert_to_numpy(penalized([x], training=False))
    np.testing.assert_array_equal(outputs, network.predict(x, verbose=0))
    hidden = keras.Model(network.inputs, features.output).predict(x, verbose=0)
    kernel = keras.ops.convert_to_numpy(last.kernel)
    expected = 0.5 * (np.square(hidden).sum() / 8 + np.square(kernel).sum())
    (penalty,) = penalized.losses
    found = float(keras.ops.convert_to_numpy(penalty))
    assert found == pytest.approx(expected, rel=1e-5)
    assert penalized.count_params() == network.count_params()
    assert not network.losses


def test_the_last_third_alone_is_perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int]] = []

    def counting(kind: type[keras.Model], name: str) -> None:
        original = kind.train_step

        def train_step(self: Any, data: Any) -> Any:
            steps.append((name, int(self.optimizer.iterations)))
            return original(self, data)

        monkeypatch.setattr(kind, "train_step", train_step)

    counting(keras_nrs.NRSModel, "nrs")
    counting(keras.Model, "plain")
    settings = SHARED | {"epochs": 1.5, "scheme": "nrs", "perturbed_from": 2 / 3}
    training.train(SMOKE, settings, 0)
    # Three epochs of three batches.
    assert steps == [("plain", i) for i in range(6)] + [("nrs", i) for i in range(6, 9)]


def test_a_growing_share_of_the_steps_is_perturbed() -> None:
    settings = SHARED | {"scheme": "nrs", "share_grows": True}
    assert training.phases(settings, 30) == [
        (10, None),
        (20, {"interval": 2}),
        (30, {}),
    ]
    _, _, measured = training.train(SMOKE, settings | {"epochs": 1.5}, 0)
    assert measured["last_model_divergence"] > 0


def test_eps_grows_along_a_cosine() -> None:
    settings = {"scheme": "nrs", "eps": 0.4, "eps_grows": 10.0}
    model = training.wrapped(SMOKE.network_of(0), settings, steps=100)
    eps = model.given_coefficients()["eps"]
    found = [float(keras.ops.convert_to_numpy(eps(step))) for step in (0, 50, 100)]
    assert found == pytest.approx([0.04, 0.22, 0.4])


def test_fine_tuning_starts_from_a_network_of_the_same_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "CACHE", tmp_path)
    settings = {"train": 20, "validation": 10, "noise": "", "classes": (0, 6)}
    task = replace(SMOKE, name="tuned", starts_from="smoke", **settings)
    trained = training.pretrained(SMOKE, 0)
    (file,) = tmp_path.rglob("*.h5")
    written = file.stat().st_mtime_ns
    network = training.initial_network(task, 0)
    drawn = random.random()
    assert file.stat().st_mtime_ns == written
    file.unlink()
    training.initial_network(task, 0)
    assert random.random() == drawn
    assert network.output_shape == (None, 2)
    for new, old in zip(network.layers[:-1], trained.layers[:-1], strict=True):
        for weight, expected in zip(new.get_weights(), old.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)
    tuned, _, _ = training.train(task, SHARED, 0)
    found = training.quality(Forward(tuned), task.test_data())
    assert found["accuracy"] >= 0.5
