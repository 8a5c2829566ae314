"""A model's factory, data and `fit()`: checks, and a training."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import settings_from
from keras_nrs.tuning.task import Task
from tests.support.data import image_data
from tests.support.data import tf_dataset
from tests.support.networks import Subclassed
from tests.support.networks import compile_classifier

X, Y = image_data(24)
DATA, VALIDATION = {"x": X, "y": Y}, {"x": X[:10], "y": Y[:10]}
DATA_PARTS = {"training": DATA, "validation": VALIDATION}
FIT = {"epochs": 2, "batch_size": 8}
BASELINE, TWICE, NRS, RPR = settings_from({"NRS": {}, "RPR": {"scheme": "rpr"}})


def classifier(**changes: Any) -> keras.Model:
    stack = [layers.Flatten(), layers.Dropout(0.2), layers.Dense(3)]
    model = keras.Sequential([keras.Input((6, 6, 1)), *stack])
    compile_classifier(model, **changes)
    return model


def task_of(make_model: Any = classifier, **fit: Any) -> Task:
    return Task(make_model, DATA, VALIDATION, FIT | fit)


def values(model: keras.Model) -> np.ndarray:
    arrays = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    return np.concatenate([array.ravel() for array in arrays])


@pytest.mark.matrix
def test_trainings_of_a_seed_begin_alike_and_see_the_same_batches() -> None:
    """A divergence of nothing, eps 0, trains as the model itself does."""
    task = task_of(lambda: classifier(optimizer=keras.optimizers.SGD(0.1)))
    inert = Setting("eps 0", {"eps": 0.0, "normalize": True})
    (row, model), (other_row, other) = (task.train(s, 3) for s in (BASELINE, inert))
    np.testing.assert_allclose(values(model), values(other), atol=1e-5)
    assert row["measured"].keys() == {"loss", "accuracy", "calibration_error"}
    assert row["measured"]["loss"] == pytest.approx(other_row["measured"]["loss"], 1e-4)
    assert not isinstance(other, keras_nrs.NRSModel)
    assert np.abs(values(task.train(BASELINE, 4)[1]) - values(model)).max() > 0.01


@pytest.mark.matrix
def test_a_training_is_measured_on_validation_data() -> None:
    row, model = task_of().train(NRS, 0)
    logs = model.evaluate(X[:10], Y[:10], return_dict=True, verbose=0)
    for name, value in logs.items():
        assert row["measured"][name] == pytest.approx(value, rel=1e-5)
    assert (row["epochs_trained"], row["failed"]) == (2, False)
    assert "perturbed_loss" in row["history"] and "val_loss" not in row["history"]
    assert row["seconds"] > 0


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.matrix
def test_each_training_has_callbacks_of_its_own(as_function: bool) -> None:
    stopping = keras.callbacks.EarlyStopping("val_loss", min_delta=1e9, patience=2)
    task = task_of(
        epochs=9, callbacks=(lambda: [stopping]) if as_function else stopping
    )
    for setting in (BASELINE, TWICE):
        row, _ = task.train(setting, 0)
        assert row["epochs_trained"] == len(row["history"]["val_loss"]) == 3
    assert (stopping.stopped_epoch > 0) == as_function


@pytest.mark.matrix
def test_losses_that_are_not_finite_are_a_failure_and_end_a_training() -> None:
    task = task_of(lambda: classifier(optimizer=keras.optimizers.SGD(1e38)), epochs=7)
    row, _ = task.train(BASELINE, 0)
    assert row["failed"]
    assert row["epochs_trained"] < 7


def never_finite(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(y_pred) * np.nan


@pytest.mark.matrix
def test_a_metric_that_does_not_decide_need_not_be_finite() -> None:
    task = task_of(lambda: classifier(metrics=["accuracy", never_finite]))
    row, _ = task.train(BASELINE, 0)
    assert np.isnan(row["measured"]["never_finite"]) and not row["failed"]


@pytest.mark.only_torch
def test_a_loss_that_ends_a_training_is_a_failure_with_finite_weights_too() -> None:
    class NotFinite(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, training: bool | None = None) -> Any:
            if training:
                self.add_loss(keras.ops.stop_gradient(np.nan * keras.ops.sum(x)))
            return x

    def make_model() -> keras.Model:
        stack = [layers.Flatten(), NotFinite(), layers.Dense(3)]
        model = keras.Sequential([keras.Input((6, 6, 1)), *stack])
        compile_classifier(model)
        return model

    row, _ = task_of(make_model).train(BASELINE, 0)
    assert row["failed"] and row["epochs_trained"] == 1
    assert np.isfinite(row["measured"]["loss"])


@pytest.mark.only_torch
def test_a_metric_of_each_class_is_left_out() -> None:
    metrics = ["accuracy", keras.metrics.F1Score()]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    one_hot = {name: d | {"y": np.eye(3)[d["y"]]} for name, d in DATA_PARTS.items()}
    make_model: Any = lambda: classifier(loss=loss, metrics=metrics)  # noqa: E731
    task = Task(make_model, one_hot["training"], one_hot["validation"], FIT)
    row, _ = task.train(BASELINE, 0)
    assert row["measured"].keys() == {"loss", "accuracy", "calibration_error"}
    assert row["history"].keys() == {"loss", "accuracy"}
    with pytest.raises(ValueError, match=r"one of \['loss', 'accuracy', 'cal"):
        Task(make_model, *one_hot.values(), FIT, "f1_score")


@pytest.mark.only_torch
def test_a_trained_model_is_freed_before_the_next_one_is_trained() -> None:
    task = task_of()
    gc.collect()
    gc.disable()
    try:
        _, model = task.train(NRS, 0)
        trained = weakref.ref(model)
        del model
        assert trained() is not None
        task.train(BASELINE, 0)
        assert trained() is None
    finally:
        gc.enable()


@pytest.mark.only_torch
def test_callbacks_that_cannot_be_copied_are_named() -> None:
    class Locked(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    task = task_of(callbacks=[Locked()])
    with pytest.raises(TypeError, match="`fit` must have callbacks that can be copied"):
        task.described_fit()


@pytest.mark.matrix
def test_a_factory_may_take_the_number_of_epochs() -> None:
    received = []

    def make_model(epochs: int) -> keras.Model:
        received.append(epochs)
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 3 * epochs)
        return classifier(optimizer=keras.optimizers.SGD(schedule))

    task = task_of(make_model)
    task.train(TWICE, 0)
    assert received == [2, 2, 4]
    assert task.takes_epochs and task.has_schedule
    assert not task_of().takes_epochs and not task_of().has_schedule

    def make_scaled() -> keras.Model:
        inner = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 4))
        return classifier(optimizer=keras.optimizers.LossScaleOptimizer(inner))

    assert task_of(make_scaled).has_schedule


@pytest.mark.matrix
def test_a_model_may_build_itself_at_the_first_batch() -> None:
    def make_model() -> keras.Model:
        model = Subclassed()
        compile_classifier(model)
        return model

    task = task_of(make_model)
    row, model = task.train(RPR, 0)
    assert "calibration_error" in row["measured"]
    assert [w.shape for w in task.built_model(2).weights] == [
        w.shape for w in model.weights
    ]


@pytest.mark.only_tensorflow
def test_data_sets() -> None:
    data = {"x": tf_dataset(X, Y)}
    task = Task(classifier, data, data, {"epochs": 1})
    row, model = task.train(NRS, 0)
    assert row["measured"]["loss"] == pytest.approx(
        model.evaluate(X, Y, verbose=0)[0], rel=1e-4
    )
    task.train(NRS, 1)


@pytest.mark.matrix
def test_a_regression_has_no_calibration_error() -> None:
    def make_model() -> keras.Model:
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten()])
        model.add(layers.Dense(1))
        model.compile("sgd", "mse")
        return model

    task = task_of(make_model)
    assert task.metric == ("loss", -1)
    assert task.train(NRS, 0)[0]["measured"].keys() == {"loss"}


def own_loss(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.square(y_pred), axis=-1)


@pytest.mark.matrix
def test_settings_that_cannot_train_the_model_are_named() -> None:
    task = task_of(lambda: classifier(loss=own_loss, metrics=[]))
    task.check_setting(RPR)
    with pytest.raises(ValueError, match="knows no divergence") as error:
        task.check_setting(NRS)
    assert error.value.__notes__ == ["It is the setting 'NRS' of `settings`."]
    with pytest.raises(TypeError, match="unexpected keyword argument 'epz'"):
        task.check_setting(Setting("mine", {"epz": 1}))


MODEL, OPTIMIZER, DENSE = classifier(), keras.optimizers.SGD(), layers.Dense(3)


def with_shared_layer() -> keras.Model:
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), DENSE])
    compile_classifier(model)
    return model


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (MODEL, "`make_model` must be a function"),
        (3, "`make_model` must be a function"),
        (lambda: None, "must return a keras.Model that is not wrapped"),
        (lambda: keras_nrs.wrap(classifier()), "Received: NRSModel"),
        (lambda: keras.Sequential([layers.Dense(3)]), "must return a compiled model"),
        (lambda: MODEL, "a new model with new weights"),
        (lambda: classifier(optimizer=OPTIMIZER), "a new optimizer at each call"),
        (with_shared_layer, "a new model with new weights"),
    ],
)
def test_bad_factories(make_model: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        task_of(make_model)
