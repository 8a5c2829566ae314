"""SAM and ASAM against their definitions, written in NumPy, and against plain Keras."""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_goes_on_alike
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.divergences import softmax
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.replicas import devices

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype("float32")
Y = RNG.integers(0, 3, 16)
EPS, PENALTY = 0.5, 0.02


def network(penalty: float = PENALTY) -> keras.Model:
    """f(x) = x W + b with a penalty on W, whose step subtracts the gradient."""
    keras.utils.set_random_seed(0)
    regularizer = keras.regularizers.L2(penalty)
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(3, kernel_regularizer=regularizer)]
    )
    model.layers[0].bias.assign([0.1, -0.2, 0.3])
    compile_classifier(model, optimizer=keras.optimizers.SGD(1.0), metrics=[])
    return model


def gradient(theta: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Of the cross entropy, in float64."""
    error = (softmax(x @ theta[0] + theta[1]) - np.eye(3)[y]) / len(x)
    return [x.T @ error, error.sum(axis=0)]


def by_hand(
    theta: list[np.ndarray], scheme: str, num_groups: int, is_shared: bool
) -> list[np.ndarray]:
    """The gradient of SAM or ASAM, the mean over groups with a delta each."""
    kernel, bias = theta
    scales = [np.abs(kernel) + 0.01, np.ones_like(bias)]
    if scheme == "sam":
        scales = [np.ones_like(w) for w in theta]
    x, y = X.astype("float64").reshape(num_groups, -1, 5), Y.reshape(num_groups, -1)
    groups = list(zip(x, y, strict=True))
    ascents = [gradient(theta, *group) for group in groups]
    if is_shared:
        ascents = [
            [np.mean(g, axis=0) for g in zip(*ascents, strict=True)]
        ] * num_groups
    found = []
    for group, ascent in zip(groups, ascents, strict=True):
        steps = [s * g for s, g in zip(scales, ascent, strict=True)]
        norm = np.sqrt(sum(np.sum(step**2) for step in steps))
        there = [
            w + EPS * s * step / norm
            for w, s, step in zip(theta, scales, steps, strict=True)
        ]
        found.append(gradient(there, *group))
    mean = [np.mean(g, axis=0) for g in zip(*found, strict=True)]
    # Once, at theta, and not in the ascent.
    return [mean[0] + 2 * PENALTY * kernel, mean[1]]


OPTIONS = [
    {},
    {"perturbations_per_replica": 2},
    *rest(
        {"memory_efficient": True},
        {"perturbations_per_replica": 2, "sync_perturbation": True},
        {"perturbations_per_replica": 2, "memory_efficient": True},
    ),
]
SEVERAL = [
    pytest.param(2, marks=pytest.mark.several_devices),
]


@pytest.mark.parametrize("num_devices", [1, *SEVERAL])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scheme", ["sam", *rest("asam")])
def test_the_gradient_is_that_of_the_definition(
    scheme: str, options: dict[str, Any], num_devices: int
) -> None:
    with devices(num_devices) if num_devices > 1 else nullcontext():
        model = network()
        nrs = keras_nrs.wrap(model, eps=EPS, scheme=scheme, **options)
    before = [w.astype("float64") for w in numpy_values(model.trainable_variables)]
    is_jax = keras.config.backend() == "jax"
    with devices(num_devices) if num_devices > 1 and is_jax else nullcontext():
        nrs.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    num_groups = num_devices * options.get("perturbations_per_replica", 1)
    shares = "sync_perturbation" in options
    expected = by_hand(before, scheme, num_groups, shares)
    for old, new, want in zip(
        before, numpy_values(model.trainable_variables), expected, strict=True
    ):
        np.testing.assert_allclose(old - new, want, atol=1e-6)


def trained(**kwargs: Any) -> tuple[list[np.ndarray], dict[str, list[float]]]:
    x, y = image_data(32)
    keras.utils.set_random_seed(0)
    model = cnn(dropout=0.5, penalty=1e-2, seed=3)
    wrapped = keras_nrs.wrap(model, **kwargs) if kwargs else model
    history = wrapped.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return numpy_values(model.variables), history.history


@pytest.mark.parametrize(
    "options",
    [{"scheme": "sam"}, *rest({"scheme": "rpr", "perturbation": "adaptive_ascent"})],
)
def test_without_an_ascent_it_is_plain_keras(options: dict[str, Any]) -> None:
    """With BatchNorm, dropout and a penalty: statistics and metrics are the clean's."""
    plain, logs = trained()
    found, own_logs = trained(eps=0.0, **options)
    for a, b in zip(plain, found, strict=True):
        # 4 steps of sums of 1,000 terms of order one, which may double errors.
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=16 * 1000 * ROUNDING)
    for name, values in logs.items():
        assert own_logs[name] == pytest.approx(values, rel=1e-3), name


@pytest.mark.parametrize("seed", [None, *rest(3)])
def test_both_passes_see_the_same_masks(seed: int | None) -> None:
    """And each step others, of PyTorch's global generator too."""
    x, y = image_data(16)
    model = cnn(dropout=0.5, seed=seed)
    model.optimizer.learning_rate = 0.0
    nrs = keras_nrs.wrap(model, eps=0.0, perturbation="ascent")
    logs = [nrs.train_on_batch(x, y, return_dict=True) for _ in range(3)]
    assert all(abs(float(log["model_divergence"])) < 1e-6 for log in logs)
    assert len({float(log["perturbed_loss"]) for log in logs}) == 3


@pytest.mark.matrix
def test_a_loss_without_a_known_divergence_will_do() -> None:
    model = network()
    model.compile("sgd", lambda y_true, y_pred: ops.max(ops.abs(y_pred), axis=-1))
    logs = keras_nrs.wrap(model, eps=0.1, scheme="sam").fit(X, Y, verbose=0).history
    assert set(logs) == {"loss", "perturbed_loss"}


@pytest.mark.matrix
def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError,
        match=r"`perturbation` must not be given with scheme='sam', whose own is "
        r"'ascent'\. Received: perturbation=RelativeBall\.",
    ):
        keras_nrs.wrap(network(), scheme="sam", perturbation="relative")
    with pytest.raises(ValueError, match="`alpha` must not be given with scheme"):
        keras_nrs.wrap(network(), alpha=0.5, scheme="asam")


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", *rest("sum")])
@pytest.mark.parametrize(
    ("num_groups", "num_devices"),
    [
        (1, 1),
        pytest.param(4, 1, marks=pytest.mark.matrix),
        pytest.param(2, 2, marks=pytest.mark.several_devices),
    ],
)
def test_gradients_are_not_scaled_as_the_loss_is(
    num_groups: int, num_devices: int, reduction: str
) -> None:
    """A step along the gradient itself, whose size counts, is that of plain Keras."""

    class Descent(keras_nrs.perturbations.Perturbation):
        needs_gradients = True

        def sample(self, weights: Any, eps: Any, rng: Any, *, gradients: Any) -> Any:
            return [-eps * gradient for gradient in gradients]

    def compiled(optimizer: Any) -> keras.Model:
        model = network(penalty=0.0)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction
        )
        model.compile(optimizer, loss)
        return model

    losses = []
    for x, y in zip(np.split(X, num_groups), np.split(Y, num_groups), strict=True):
        plain = compiled(keras.optimizers.SGD(0.1))
        plain.train_on_batch(x, y)
        losses.append(float(plain.test_on_batch(x, y)))
    scope = devices(num_devices) if num_devices > 1 else nullcontext()
    with scope:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0))
        nrs = keras_nrs.wrap(
            compiled(optimizer),
            eps=0.1,
            scheme="rpr",
            perturbation=Descent(),
            perturbations_per_replica=num_groups // num_devices,
        )
        logs = nrs.fit(X, Y, batch_size=16, shuffle=False, verbose=0).history
    expected = np.sum(losses) if reduction == "sum" else np.mean(losses)
    assert logs["perturbed_loss"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.matrix
def test_saving(tmp_path: Any) -> None:
    nrs = keras_nrs.wrap(network(), eps=0.1, scheme="asam")
    nrs.fit(X, Y, verbose=0)
    loaded = assert_goes_on_alike(nrs, tmp_path / "asam.keras", X, Y)
    assert loaded.scheme == "asam"
