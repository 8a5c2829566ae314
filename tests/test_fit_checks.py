"""What fit() checks by itself: eps, and that processes agree."""

import math
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs import fit_checks
from keras_nrs.fit_checks import ProcessesAgree
from tests.support.data import image_data
from tests.support.faults import LOGITS
from tests.support.faults import TERMS
from tests.support.faults import Infinite
from tests.support.faults import Scaled
from tests.support.faults import infinite_at
from tests.support.faults import linear_classifier
from tests.support.faults import normal_data
from tests.support.matrix import rest
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier


def fit(**kwargs: Any) -> Any:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), seed=0, **kwargs)
    nrs.fit(x, y, batch_size=16, epochs=2, verbose=0)
    return nrs


def test_inert_eps_is_reported_once() -> None:
    """The warning names eps, the divergence, the norm and what to do."""
    x, y = image_data()
    with pytest.warns(UserWarning) as record:
        nrs = fit(eps=1e-3, perturbation="ball")
        nrs.fit(x, y, verbose=0)
    (warning,) = (w for w in record if "has no effect" in str(w.message))
    text = str(warning.message)
    for part in ("eps=0.001", "Ball", "divergence was", "norm of the weights is"):
        assert part in text
    for advice in ("perturbation='relative'", "calibrate_eps"):
        assert advice in text


@pytest.mark.matrix
@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 1e-3, "alpha": 0.0},
        {"eps": 0.3, "perturbation": "relative"},
        {"eps": 0.0},
        {"eps": 1e-3, "scheme": "rpr"},
        {"eps": 1e-3, "scheme": "baseline"},
    ],
    ids=str,
)
def test_no_warning(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(**arguments)


@pytest.mark.matrix
def test_an_inert_eps_is_reported_though_the_loss_vanishes() -> None:
    """Compared with the loss of the first epoch."""
    x, y = np.tile(np.eye(4, dtype="float32"), (16, 1)), np.arange(64) % 2
    model = keras.Sequential([keras.Input((4,))])
    model.add(keras.layers.Dense(2, kernel_initializer="zeros"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.4), loss)
    nrs = keras_nrs.wrap(model, eps=0.04, perturbation="ball", normalize=False, seed=0)
    with pytest.warns(UserWarning, match=r"eps=0\.04 has no effect") as record:
        history = nrs.fit(x, y, epochs=20, batch_size=8, verbose=0).history
    (warning,) = (w for w in record if "has no effect" in str(w.message))
    # Where `fit()` was called.
    assert warning.filename == __file__
    # Compared with the loss of its own epoch, it would not have been said.
    shares = np.divide(history["model_divergence"], history["loss"])
    assert shares.max() > 1.3e-4


@pytest.mark.matrix
def test_an_eps_that_takes_effect_later_is_not_reported() -> None:
    """The kernel, and with it delta, grows from next to nothing."""
    x, y = image_data()
    model = keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3, kernel_initializer=keras.initializers.Constant(0)))
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.01))
    nrs = keras_nrs.wrap(model, eps=0.5, perturbation="relative", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = nrs.fit(x, y, batch_size=32, epochs=20, verbose=0).history
    assert history["model_divergence"][0] < 1e-4 * history["loss"][0]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "perturbation", ["relative", "layerwise", "filterwise", "elementwise"]
)
def test_an_eps_longer_than_the_weights_is_reported(perturbation: str) -> None:
    with pytest.warns(UserWarning, match="delta may be longer than the weights"):
        fit(eps=1.5, perturbation=perturbation)


@pytest.mark.matrix
def test_a_schedule_that_grows_beyond_the_weights_is_reported_once() -> None:
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 6, 1.5)
    with pytest.warns(UserWarning, match="delta may be longer") as record:
        fit(eps=schedule, perturbation="filterwise")
    assert sum("delta may be longer" in str(w.message) for w in record) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("last", [1e-3, 30.0])
def test_a_schedule_is_judged_by_its_largest_values(last: float) -> None:
    """At the end of training: it begins with nothing."""
    (x, y), num_steps = image_data(208), 104
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, num_steps, last)
    nrs = keras_nrs.wrap(cnn(), eps=schedule, perturbation="ball", seed=0)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        nrs.fit(x, y, batch_size=8, epochs=4, verbose=0)
    found = [str(w.message) for w in record if "has no effect" in str(w.message)]
    assert len(found) == (last < 1)
    if found:
        assert found[0].startswith("eps=0.00099 has no effect")


@pytest.mark.parametrize("batch", [3, *rest(1)])
@pytest.mark.parametrize("eps", [1e-6, *rest(0.3)])
def test_evaluation_within_an_epoch_hides_no_divergence(batch: int, eps: float) -> None:
    """It resets the means of the logs: after the last batch they are 0."""
    x, y = image_data()

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, index: int, logs: Any = None) -> None:
            if index == batch:
                self.model.evaluate(x, y, verbose=0)

    nrs = keras_nrs.wrap(cnn(), eps=eps, perturbation="relative", seed=0)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        nrs.fit(x, y, batch_size=16, verbose=0, callbacks=[Evaluate()])
    found = [w for w in record if "has no effect" in str(w.message)]
    assert len(found) == (eps < 0.1)


@pytest.mark.matrix
@pytest.mark.parametrize("epochs", [1, 6])
def test_a_new_head_gets_time_to_learn(epochs: int) -> None:
    """Its first outputs are uniform, at whichever eps."""
    rng = np.random.default_rng(0)
    x, y = 0.03 * rng.normal(size=(832, 64)).astype("float32"), np.arange(832) % 10
    body = layers.Dense(256, activation="relu", trainable=False)
    model = keras.Sequential([keras.Input((64,)), body, layers.Dense(10)])
    compile_classifier(model, optimizer=keras.optimizers.Adam(0.01))
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = nrs.fit(x, y, batch_size=8, epochs=epochs, verbose=0).history
    if epochs == 1:
        assert history["model_divergence"][0] < 1e-4 * history["loss"][0]


@pytest.mark.matrix
def test_a_head_that_learns_nothing_is_reported() -> None:
    x, y = image_data(128)
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten()])
    model.add(layers.Dense(3, use_bias=False))
    compile_classifier(model, optimizer=keras.optimizers.SGD(1e-9))
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative", seed=0)
    with pytest.warns(UserWarning, match=r"eps=0\.3 has no effect.*after \d epochs"):
        nrs.fit(1e-3 * x, y, batch_size=2, epochs=4, verbose=0)


@pytest.mark.matrix
def test_no_warning_for_a_scheduled_eps() -> None:
    class WarmUp(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.eps = 1e-3 * (1 + epoch)

    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), eps=0.5)
    nrs.fit(x, y, epochs=2, verbose=0, callbacks=WarmUp())


@pytest.mark.matrix
def test_model_that_builds_itself_in_fit() -> None:
    model = Subclassed()
    compile_classifier(model)
    x, y = image_data()
    with pytest.warns(UserWarning, match="no effect"):
        keras_nrs.wrap(model, eps=1e-3).fit(x, y, batch_size=16, verbose=0)


@pytest.mark.matrix
def test_alpha_is_named_where_alpha_is_at_fault() -> None:
    with pytest.warns(UserWarning, match="alpha=1e-06 is too small"):
        fit(eps=2.0, alpha=1e-6, perturbation="ball")


@pytest.mark.matrix
def test_added_to_the_users_callback_list() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), eps=1e-3)
    callbacks = keras.callbacks.CallbackList(model=nrs, add_history=True, epochs=1)
    with pytest.warns(UserWarning, match="no effect"):
        nrs.fit(x, y, batch_size=16, verbose=0, callbacks=callbacks)


def test_processes_that_would_wait_for_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        _initial_epoch = None

    monkeypatch.setattr(
        fit_checks,
        "values_of_processes",
        lambda values: [values, [values[0] - 1, values[1]]],
    )
    callback = ProcessesAgree()
    callback.set_params({"steps": 4})
    callback._model = Model()
    with pytest.raises(ValueError, match=r"\(4, 0\), \(3, 0\).*drop_remainder=True"):
        callback.on_train_begin()


@pytest.mark.matrix
@pytest.mark.parametrize("who", ["this", "other"])
def test_all_processes_end_after_the_epoch_in_which_one_stops(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    def of_two(values: list[float], model: Any = None) -> list[list[float]]:
        wishes = model is not None
        return [values, [float(who == "other")] if wishes else values]

    monkeypatch.setattr(fit_checks, "values_of_processes", of_two)
    nrs = keras_nrs.wrap(linear_classifier(), eps=0.3)
    batches = []

    def stop(batch: int, logs: Any) -> None:
        batches.append(batch)
        nrs.stop_training = who == "this" and batch == 0

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    x, y = normal_data(8)
    history = nrs.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[callback])
    assert history.epoch == [0]
    assert batches == [0, 1]
    assert nrs.stop_training


@pytest.mark.matrix
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize("name", ["eps", "alpha"])
def test_a_value_assigned_to_the_variable_is_checked_at_the_next_epoch(
    name: str, value: float
) -> None:
    nrs = keras_nrs.wrap(linear_classifier(), eps=0.3)
    x, y = normal_data(8)
    seen = []

    def assign(epoch: int, logs: Any) -> None:
        seen.append(epoch)
        getattr(nrs, name).assign(value)

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=assign)]
    with pytest.raises(ValueError, match=f"`{name}` must be finite and >= 0"):
        nrs.fit(x, y, epochs=3, verbose=0, callbacks=callbacks)
    assert seen == [0]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["eps", "alpha", "beta"])
def test_float32_is_the_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be at most 3.4e\+38.*1e\+39"):
        keras_nrs.wrap(linear_classifier(), **{name: 1e39})


# Terms that are not finite.


def fault_of(nrs: Any, x: np.ndarray, y: np.ndarray, **arguments: Any) -> str:
    """The one warning of a `fit()`."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        nrs.fit(x, y, batch_size=8, shuffle=False, verbose=0, **arguments)
    texts = [str(w.message) for w in record if w.category is UserWarning]
    (text,) = (text for text in texts if "the mean" in text)
    return text


def named(text: str) -> set[str]:
    return {term for term in TERMS if f" {term} is " in text}


def test_a_fault_of_the_data_is_named_once_with_its_epoch() -> None:
    """The weights are not finite after it: the second epoch says nothing new."""
    text = fault_of(
        keras_nrs.wrap(linear_classifier(), eps=0.3), *infinite_at(1), epochs=2
    )
    assert named(text) == set(TERMS)
    assert "In epoch 1, up to step 4 of fit()" in text
    assert "The weights are not finite" in text
    for advice in ("NaN in the data", "learning rate", "TerminateOnNaN", "eps=0.3"):
        assert advice in text


@pytest.mark.matrix
def test_a_fault_in_a_later_epoch() -> None:
    """When eps grows beyond what float32 can hold."""

    class Grow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.eps = (0.3, 0.3, 3e38)[epoch]

    x, y = normal_data(8)
    nrs = keras_nrs.wrap(linear_classifier(), perturbation=Scaled())
    text = fault_of(nrs, 4 * x, y, epochs=3, callbacks=[Grow()])
    assert "In epoch 3, up to step 3 of fit()" in text
    assert {"perturbed_loss", "model_divergence"} <= named(text)
    assert "eps=3e+38 is too large" in text


@pytest.mark.matrix
def test_the_divergence_alone_is_named() -> None:
    """Together with the total, of which it is a part."""
    x, y = normal_data(8)
    nrs = keras_nrs.wrap(linear_classifier(), eps=0.3, divergence=Infinite())
    assert named(fault_of(nrs, x, y)) == {"loss", "model_divergence"}


@pytest.mark.matrix
def test_the_loss_alone_is_named() -> None:
    """An infinite penalty is in neither of the other terms."""
    penalty = keras.regularizers.L1(1e38)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(30, kernel_regularizer=penalty)]
    )
    model.compile("sgd", LOGITS)
    x, y = normal_data(8)
    text = fault_of(keras_nrs.wrap(model, eps=0.3), 100 * x, y)
    assert named(text) == {"loss"}
    assert "eps=0.3 is too large" not in text


@pytest.mark.matrix
def test_a_baseline_is_judged_too() -> None:
    text = fault_of(
        keras_nrs.wrap(linear_classifier(), scheme="baseline"), *infinite_at(0)
    )
    assert named(text) == {"loss"}
    assert "In epoch 1, the mean loss is" in text
