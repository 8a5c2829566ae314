"""eps and alpha as numbers, and as schedules of the training steps."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import CosineDecay
from keras.optimizers.schedules import LearningRateSchedule
from keras.optimizers.schedules import PolynomialDecay

import keras_nrs
from keras_nrs.coefficients import Coefficient
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.perturbations import FixedPerturbation

BATCH, STEPS = 16, 4  # Steps of an epoch.


def growth(first: float = 0.1, last: float = 0.9, steps: int = 8) -> Any:
    """Linear, to a power that keeps it so."""
    return PolynomialDecay(first, steps, last)


def value(variable: Any) -> float:
    return float(keras.ops.convert_to_numpy(variable))


class Observed(keras.callbacks.Callback):
    """The values in use after each step, or those that it assigns before it."""

    def __init__(self, assigns: Any = None) -> None:
        super().__init__()
        self._assigns = assigns
        self.values: list[tuple[float, float]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._assigns is not None:
            self._assigns(self.model, len(self.values))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.values.append((value(self.model.eps), value(self.model.alpha)))


def new(eps: Any = 0.3, alpha: Any = 1.0, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    options = {"perturbation": FixedPerturbation(), "seed": 0} | options
    return keras_nrs.wrap(cnn(), eps, alpha, **options)


def fit(nrs: Any, *callbacks: Any, epochs: int = 2, **arguments: Any) -> dict[str, Any]:
    x, y = image_data(BATCH * STEPS)
    history = nrs.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **arguments,
    )
    return history.history


def assert_close(model: Any, expected: Any) -> None:
    """Equal weights but for rounding of eps and alpha, through 8 steps."""
    for a, b in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_allclose(*numpy_values([a, b]), rtol=1e-4, atol=1e-4)


# A coefficient by itself.


def test_a_number_is_the_value_of_every_step() -> None:
    coefficient = Coefficient("eps", 0.25)
    assert coefficient.schedule is None
    assert value(coefficient.at(7)) == value(coefficient.variable) == 0.25


def test_a_schedule_gives_the_value_of_a_step() -> None:
    coefficient = Coefficient("eps", growth())
    assert value(coefficient.variable) == pytest.approx(0.1)
    for step in (0, 3, keras.ops.convert_to_tensor(3, "int32"), 100):
        expected = 0.1 + 0.1 * min(value(step), 8)
        # A few products of float32.
        assert value(coefficient.at(step)) == pytest.approx(expected, rel=8 * ROUNDING)
    coefficient.assign(0.5)
    assert coefficient.schedule is None and value(coefficient.at(3)) == 0.5


class Constant(LearningRateSchedule):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, step: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (Constant(-0.5), ValueError, r"`eps\(0\)` must be finite and >= 0"),
        (Constant(float("nan")), ValueError, r"`eps\(0\)` must be finite"),
        (Constant("high"), TypeError, r"`eps\(0\)` must be a number"),
        (Constant(np.ones(2)), TypeError, r"`eps\(0\)` must be a number"),
        (lambda step: 0.1, TypeError, r"`eps` must be a number or a LearningRateSch"),
        (CosineDecay, TypeError, r"`eps` must be a number or a LearningRateSchedule"),
        ("high", TypeError, r"`eps` must be a number"),
    ],
)
def test_what_is_neither_a_number_nor_a_schedule(
    given: Any, error: type[Exception], text: str
) -> None:
    coefficient = Coefficient("eps", 0.25)
    with pytest.raises(error, match=text):
        coefficient.assign(given)
    assert coefficient.given == value(coefficient.at(0)) == 0.25


# In training.


@pytest.mark.parametrize(
    "options", [{"interval": 3}, *rest({}, {"memory_efficient": True})]
)
def test_a_schedule_is_what_a_callback_would_assign(options: Any) -> None:
    """At every step, those that `interval` leaves out too; and nothing is traced."""

    def assign(model: Any, step: int) -> None:
        model.eps = 0.1 + 0.1 * step
        model.alpha = 4.0 - 0.4 * step

    scheduled = new(growth(), growth(4.0, 0.8), **options)
    assigned = new(**options)
    shown, given = Observed(), Observed(assign)
    history = fit(scheduled, shown)
    expected = fit(assigned, given)
    np.testing.assert_allclose(shown.values, given.values, rtol=8 * ROUNDING)
    assert_close(scheduled, assigned)
    for name, logged in expected.items():
        np.testing.assert_allclose(history[name], logged, rtol=1e-4)
    assert value(scheduled.eps) == pytest.approx(0.8)


@pytest.mark.matrix
def test_alpha_may_grow_from_zero() -> None:
    """With beta = 0 a step with alpha = 0 has no perturbed pass."""
    history = fit(new(0.5, growth(0.0, 1.0), beta=0.0))
    plain = fit(new(0.5, 0.0, beta=0.0))
    assert history["model_divergence"][1] > 0
    assert history["loss"][0] != plain["loss"][0]


@pytest.mark.parametrize(
    "arguments", [{"steps_per_execution": 2}, *rest({"run_eagerly": True})]
)
def test_execution_modes(arguments: Any) -> None:
    if keras.config.backend() == "torch":
        arguments = {"jit_compile": False}  # Keras has one mode there.
    expected, nrs, shown = new(growth()), new(growth()), Observed()
    fit(expected)
    nrs.compile(nrs.optimizer, nrs.loss, **arguments)
    fit(nrs, shown)
    assert shown.values[-1] == pytest.approx((0.8, 1.0))
    assert_close(nrs, expected)


def test_a_number_replaces_a_schedule_in_training_and_back() -> None:
    def assign(model: Any, step: int) -> None:
        if step == 3:
            model.eps = 0.25
        if step == 6:
            model.eps = growth()

    shown = Observed(assign)
    fit(new(growth()), shown)
    expected = [0.1, 0.2, 0.3, 0.25, 0.25, 0.25, 0.7, 0.8]
    assert [eps for eps, _ in shown.values] == pytest.approx(expected)


def test_nothing_is_compiled_again() -> None:
    traced = []

    class Counted(LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            traced.append(step)
            return 0.1 * keras.ops.cast(step, "float32")

    nrs = new(Counted())
    fit(nrs, epochs=1)
    num_traced = len(traced)
    fit(nrs, epochs=3)
    # PyTorch runs every step in Python.
    expected = 3 * STEPS if keras.config.backend() == "torch" else 0
    assert len(traced) - num_traced == expected


@pytest.mark.matrix  # It compiles four models.
def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """In the next `fit()`, in a loaded model, and from a backup."""
    options = {"perturbation": "filterwise", "interval": 3}
    whole = new(growth(), growth(4.0, 0.8), **options)
    shown = Observed()
    fit(whole, shown, epochs=4)
    path = tmp_path / "nrs.keras"

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    half = new(growth(), growth(4.0, 0.8), **options)
    with pytest.raises(KeyboardInterrupt):
        fit(half, backup(), Interrupt(), epochs=4)
    half.save(path)
    loaded = keras.saving.load_model(path)
    assert value(loaded.eps) == value(half.eps) == pytest.approx(0.8)
    resumed = new(growth(), growth(4.0, 0.8), **options)
    for nrs, own in ((half, []), (loaded, []), (resumed, [backup()])):
        seen = Observed()
        initial = {} if own else {"initial_epoch": 2}
        fit(nrs, *own, seen, epochs=4, **initial)
        assert seen.values == shown.values[-2 * STEPS :]
        assert_equal(numpy_values(nrs.variables), numpy_values(whole.variables))


@pytest.mark.matrix
def test_a_config_holds_the_schedules(tmp_path: Path) -> None:
    nrs = new(CosineDecay(0.1, 20, warmup_target=0.5, warmup_steps=5), growth())
    config = nrs.get_config()
    clone = keras_nrs.NRSModel.from_config(config)
    assert clone.get_config() == config
    assert isinstance(clone.given_coefficients()["eps"], CosineDecay)
    # A number is saved as before.
    nrs.eps = 0.2
    assert nrs.get_config()["eps"] == pytest.approx(0.2)


@pytest.mark.matrix
def test_a_schedule_and_nrs_schedule_exclude_each_other() -> None:
    nrs = new(alpha=growth())
    schedule = keras_nrs.callbacks.NRSSchedule(warmup_epochs=2)
    with pytest.raises(ValueError, match=r"`alpha` of the model has a schedule"):
        fit(nrs, schedule)
    nrs.alpha = 1.0
    assert fit(nrs, schedule)["alpha"] == pytest.approx([0.5, 1.0])


@pytest.mark.matrix
def test_an_optimizer_and_a_coefficient_may_share_a_schedule() -> None:
    schedule = growth(0.02, 0.1)
    nrs = new(schedule)
    nrs.compile(keras.optimizers.SGD(schedule), nrs.loss)
    fit(nrs)
    assert value(nrs.eps) == pytest.approx(0.09)
