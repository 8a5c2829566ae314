import copy
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.perturbations import FixedPerturbation


def linear_regression(weights: int = 3) -> keras.Model:
    model = keras.Sequential([keras.Input((weights,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    return model


def test_eps_equals_the_closed_form() -> None:
    """GaussianKL of a linear model: eps ** 2 * mean((x @ pattern) ** 2) / 2."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    pattern = np.cos(np.arange(3.0))[:, None]
    target = 0.3
    eps = keras_nrs.calibrate_eps(
        linear_regression(),
        x,
        target_divergence=target,
        perturbation=FixedPerturbation(),
    )
    expected = np.sqrt(2 * target / np.mean((x @ pattern) ** 2))
    # Bisection stops at 1 %, from above.
    assert expected * (1 - 1e-4) <= eps <= expected * 1.011
    assert eps.divergence == pytest.approx(target, rel=0.025)
    assert eps.standard_error == pytest.approx(0.0, abs=1e-6)
    assert "standard_error" in repr(eps)
    for twin in (copy.copy(eps), copy.deepcopy(eps), pickle.loads(pickle.dumps(eps))):
        assert repr(twin) == repr(eps)
        assert type(twin.perturbation) is FixedPerturbation


@pytest.mark.parametrize(
    "perturbation",
    [
        "filterwise",
        *rest("ball", "relative", "layerwise", "elementwise", "released"),
    ],
)
def test_reaches_the_target(perturbation: str) -> None:
    x, _ = image_data(48)
    eps = keras_nrs.calibrate_eps(
        cnn(batch_norm=False),
        x,
        target_divergence=0.05,
        perturbation=perturbation,
        num_samples=4,
    )
    # The divergence is about quadratic in eps, which is known to 1 %.
    assert eps.divergence == pytest.approx(0.05, rel=0.05)
    assert eps.standard_error > 0


@pytest.mark.matrix
def test_takes_the_settings_of_a_wrapped_model() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    model = linear_regression()
    settings: dict[str, Any] = {
        "perturbation": FixedPerturbation(),
        "divergence": keras_nrs.divergences.GaussianKL(stddev=0.1),
    }
    wrapped = keras_nrs.calibrate_eps(
        keras_nrs.wrap(model, **settings), x, target_divergence=0.2
    )
    assert wrapped == keras_nrs.calibrate_eps(
        model, x, target_divergence=0.2, **settings
    )


@pytest.mark.matrix
def test_larger_target_gives_larger_eps_and_nothing_changes() -> None:
    x, _ = image_data(32)
    model = cnn(dropout=0.5, seed=1)
    before = numpy_values(model.variables)
    eps = [
        keras_nrs.calibrate_eps(model, x, target_divergence=t, num_samples=2)
        for t in (0.001, 0.1)
    ]
    assert eps[0] < eps[1]
    assert_equal(numpy_values(model.variables), before)


@pytest.mark.matrix
def test_ignored_class_and_loss_of_ones_own() -> None:
    x, y = image_data(16)
    ignoring = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=0
    )

    def own(y_true: Any, y_pred: Any) -> Any:
        return ignoring.fn(y_true, y_pred, from_logits=True)

    for loss in (ignoring, own):
        model = cnn(compile=False)
        model.compile("sgd", loss)
        nrs = keras_nrs.wrap(model, eps=1.0)
        nrs.train_on_batch(x, y)
        assert keras_nrs.calibrate_eps(
            nrs, x, target_divergence=0.1, num_samples=2
        ).divergence == pytest.approx(0.1, rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target_divergence": 0.0}, "`target_divergence` must be > 0"),
        ({"target_divergence": float("nan")}, "`target_divergence`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"x": np.zeros((0, 3))}, "`x` must be"),
        ({"x": iter([1])}, "`x` must be"),
        ({"perturbation": "box"}, "`perturbation`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    x = arguments.pop("x", np.ones((4, 3), "float32"))
    with pytest.raises(ValueError, match=match):
        keras_nrs.calibrate_eps(
            linear_regression(), x, **({"target_divergence": 0.1} | arguments)
        )


@pytest.mark.matrix
def test_target_that_no_eps_reaches() -> None:
    """A perturbation that leaves the outputs alone."""

    class Nothing(keras_nrs.perturbations.Perturbation):
        def sample(self, weights: Any, eps: Any, rng: Any) -> Any:
            return [0.0 * w for w in weights]

    with pytest.raises(ValueError, match="cannot be reached"):
        keras_nrs.calibrate_eps(
            linear_regression(),
            np.ones((4, 3), "float32"),
            target_divergence=0.1,
            perturbation=Nothing(),
            num_samples=1,
        )


def test_a_target_beyond_which_outputs_overflow_is_an_error() -> None:
    """Probabilities are clipped, and so is their divergence."""
    hidden = [layers.Dense(4) for _ in range(8)]
    outputs = layers.Dense(3, activation="softmax")
    model = keras.Sequential([keras.Input((4,)), *hidden, outputs])
    model.compile("sgd", "categorical_crossentropy")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    with pytest.raises(ValueError, match="`target_divergence` cannot be reached"):
        keras_nrs.calibrate_eps(model, x, target_divergence=100.0, num_samples=2)
