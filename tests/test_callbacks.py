import warnings
from typing import Any

import keras
import pytest

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

# NRSSchedule.


def scheduled(schedule: Any, epochs: int = 4, **kwargs: Any) -> dict[str, list[float]]:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), perturbation="relative", **kwargs)
    history = nrs.fit(x, y, epochs=epochs, verbose=0, callbacks=[schedule])
    return history.history


def test_start_and_warm_up() -> None:
    schedule = keras_nrs.callbacks.NRSSchedule(
        alpha=2.0, start_epoch=1, warmup_epochs=2
    )
    history = scheduled(schedule, eps=0.25)
    assert history["eps"] == pytest.approx([0, 0.125, 0.25, 0.25])
    assert history["alpha"] == pytest.approx([0, 1, 2, 2])
    assert history["model_divergence"][0] == 0 < history["model_divergence"][1]


@pytest.mark.matrix  # It runs eagerly, where JAX compiles each operation.
@pytest.mark.parametrize("scheme", ["nrs", "rpr", "sam"])
def test_before_the_start_steps_are_plain_ones(scheme: str) -> None:
    """Of the price and the result of plain Keras, with the paper's sum too."""
    (x, y), calls = image_data(), []

    class Network(Subclassed):
        def call(self, x: Any, training: bool | None = None) -> Any:
            calls.append(training)
            return super().call(x)

    def compiled() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = Network()
        model(x[:1])
        compile_classifier(model, run_eagerly=True)
        return model

    plain, model = compiled(), compiled()
    nrs = keras_nrs.wrap(model, scheme=scheme, normalize=False, seed=0)
    schedule = keras_nrs.callbacks.NRSSchedule(start_epoch=2)
    options: dict[str, Any] = {"batch_size": 16, "shuffle": False, "verbose": 0}
    for trained, callbacks in ((plain, []), (nrs, [schedule])):
        calls.clear()
        before = trained.fit(x, y, epochs=2, callbacks=callbacks, **options).history
        assert calls.count(True) == 2 * len(x) // 16
    assert_equal(numpy_values(model.weights), numpy_values(plain.weights))
    assert before["perturbed_loss"] == [0, 0]
    options |= {"initial_epoch": 2, "epochs": 3, "callbacks": [schedule]}
    assert nrs.fit(x, y, **options).history["perturbed_loss"][0] > 0


@pytest.mark.matrix
def test_an_interrupted_schedule_leaves_no_plain_steps_behind() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), eps=0.2)

    def interrupt(epoch: int, logs: Any = None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nrs.fit(
            x,
            y,
            verbose=0,
            callbacks=[
                keras_nrs.callbacks.NRSSchedule(start_epoch=2),
                keras.callbacks.LambdaCallback(on_epoch_end=interrupt),
            ],
        )
    nrs.eps = 0.2
    history = nrs.fit(x, y, verbose=0).history
    assert history["model_divergence"][0] > 0


@pytest.mark.matrix
def test_functions_of_the_epoch() -> None:
    schedule = keras_nrs.callbacks.NRSSchedule(eps=lambda epoch: 0.1 / (1 + epoch))
    history = scheduled(schedule, epochs=2, alpha=3.0)
    assert history["eps"] == pytest.approx([0.1, 0.05])
    assert history["alpha"] == pytest.approx([3, 3])


@pytest.mark.matrix
def test_a_schedule_goes_on_at_the_initial_epoch() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), eps=0.2, perturbation="relative")
    schedule = keras_nrs.callbacks.NRSSchedule(warmup_epochs=4)
    for first, last in ((0, 1), (1, 2)):
        history = nrs.fit(
            x, y, initial_epoch=first, epochs=last, verbose=0, callbacks=[schedule]
        )
    assert history.history["eps"] == pytest.approx([0.1])


@pytest.mark.matrix
def test_one_schedule_for_several_models() -> None:
    schedule = keras_nrs.callbacks.NRSSchedule(warmup_epochs=2)
    for eps in (0.4, 0.8):
        history = scheduled(schedule, epochs=2, eps=eps)
        assert history["eps"] == pytest.approx([eps / 2, eps])


@pytest.mark.matrix
def test_a_schedule_and_a_backup(tmp_path: Any) -> None:
    """Interrupted while eps is still 0."""
    x, y = image_data()

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    def callbacks() -> list[Any]:
        schedule = keras_nrs.callbacks.NRSSchedule(start_epoch=2)
        return [keras.callbacks.BackupAndRestore(tmp_path), schedule]

    def nrs() -> Any:
        return keras_nrs.wrap(cnn(), eps=0.2, perturbation="relative")

    with pytest.raises(KeyboardInterrupt):
        nrs().fit(x, y, epochs=3, verbose=0, callbacks=[*callbacks(), Interrupt()])
    history = nrs().fit(x, y, epochs=3, verbose=0, callbacks=callbacks()).history
    assert history["eps"] == pytest.approx([0, 0.2])


@pytest.mark.matrix
def test_a_schedule_goes_on_in_a_loaded_model(tmp_path: Any) -> None:
    """Which was saved when eps was on its way."""
    x, y = image_data()
    path = tmp_path / "model.keras"
    nrs = keras_nrs.wrap(cnn(), eps=0.1, perturbation="relative")
    nrs.eps = 0.4

    def callbacks() -> list[Any]:
        schedule = keras_nrs.callbacks.NRSSchedule(start_epoch=1, warmup_epochs=4)
        return [schedule, keras.callbacks.ModelCheckpoint(path)]

    nrs.fit(x, y, epochs=3, verbose=0, callbacks=callbacks())
    assert float(nrs.eps) == pytest.approx(0.4)
    loaded = keras.saving.load_model(path)
    assert float(loaded.eps) == pytest.approx(0.2)
    history = loaded.fit(
        x, y, epochs=6, initial_epoch=3, verbose=0, callbacks=callbacks()
    ).history
    assert history["eps"] == pytest.approx([0.3, 0.4, 0.4])
    assert history["alpha"] == pytest.approx([0.75, 1, 1])
    assert (float(loaded.eps), float(loaded.alpha)) == pytest.approx((0.4, 1.0))


@pytest.mark.matrix
def test_bad_schedules() -> None:
    schedule = keras_nrs.callbacks.NRSSchedule
    with pytest.raises(ValueError, match="`eps` must be finite and >= 0"):
        schedule(eps=-1.0)
    with pytest.raises(ValueError, match="`start_epoch` must be an integer >= 0"):
        schedule(start_epoch=-1)
    with pytest.raises(ValueError, match="`alpha` must be finite and >= 0"):
        scheduled(schedule(alpha=lambda epoch: -1.0))
    x, y = image_data()
    with pytest.raises(TypeError, match="NRSSchedule needs an NRSModel"):
        cnn().fit(x, y, verbose=0, callbacks=[schedule()])


# FlatnessMonitor.


@pytest.mark.parametrize("is_wrapped", [True, *rest(False)])
def test_flatness_is_monitored(is_wrapped: bool, tmp_path: Any) -> None:
    """In history and in the files of callbacks that come later; as measured by hand."""
    x, y = image_data()
    model: Any = cnn()
    if is_wrapped:
        model = keras_nrs.wrap(model, eps=0.2, perturbation="relative")
    eps = None if is_wrapped else 0.5
    monitor = keras_nrs.callbacks.FlatnessMonitor(x, y, every=2, k=2, eps=eps)
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=[monitor, logger]).history
    flatness = keras_nrs.flatness
    exact = flatness.hessian_eigenvalues(model, x, y, k=2).eigenvalues
    divergence = flatness.model_divergence(model, x, eps=0.2 if is_wrapped else 0.5)
    assert [len(history[f"val_eigenvalue_{i}"]) for i in (1, 2)] == [2, 2]
    for i, value in enumerate(exact):
        assert history[f"val_eigenvalue_{i + 1}"][-1] == pytest.approx(value, rel=1e-4)
    assert history["val_model_divergence"][-1] == pytest.approx(divergence.mean)


@pytest.mark.matrix  # The choice is the same on all backends.
def test_a_monitor_of_sam_measures_no_divergence_unless_told_how() -> None:
    x, y = image_data()
    for options, is_measured in ((None, False), ({"perturbation": "relative"}, True)):
        model = keras_nrs.wrap(cnn(), scheme="sam")
        monitor = keras_nrs.callbacks.FlatnessMonitor(
            x, y, k=0, divergence_options=options
        )
        history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
        assert ("val_model_divergence" in history) == is_measured


@pytest.mark.matrix
def test_a_monitor_changes_nothing_in_training() -> None:
    x, y = image_data()
    weights = []
    for callbacks in ([], [keras_nrs.callbacks.FlatnessMonitor(x, y, eps=0.1)]):
        keras.utils.set_random_seed(0)
        model = keras_nrs.wrap(cnn(dropout=0.3, seed=0), eps=0.1, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
        weights.append(numpy_values(model.weights))
    assert_equal(*weights)


@pytest.mark.matrix
def test_bad_monitors() -> None:
    monitor = keras_nrs.callbacks.FlatnessMonitor
    x, y = image_data()
    with pytest.raises(TypeError, match="`x` must be arrays or a data set that can be"):
        monitor(iter([(x, y)]))
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        monitor(x, y, every=0)
    with pytest.raises(ValueError, match="`eps` must be finite and >= 0"):
        monitor(x, y, eps=-1.0)
    with pytest.raises(ValueError, match="`tol` must be > 0"):
        monitor(x, y, eigenvalue_options={"tol": 0.0})


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.1}, "`perturbation` must not need the gradient"),
        (
            {"divergence_options": {"eps": 0.1, "num_samples": 0}},
            "`num_samples` must be an integer >= 1",
        ),
        (
            {"eigenvalue_options": {"variables": lambda v: False}},
            "`variables` must select",
        ),
    ],
)
def test_a_bad_monitor_is_an_error_before_training(
    options: dict[str, Any], message: str
) -> None:
    x, y = image_data()
    model = keras_nrs.wrap(cnn(), scheme="sam")
    before = numpy_values(model.weights)
    monitor = keras_nrs.callbacks.FlatnessMonitor(x, y, every=2, **options)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[monitor])
    assert_equal(numpy_values(model.weights), before)


@pytest.mark.matrix  # The choice is the same on all backends.
def test_eps_among_the_options_of_a_monitor() -> None:
    x, y = image_data()
    model = cnn()
    options = {"eps": 0.5, "num_samples": 2}
    monitor = keras_nrs.callbacks.FlatnessMonitor(x, y, k=0, divergence_options=options)
    history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
    expected = keras_nrs.flatness.model_divergence(model, x, eps=0.5, num_samples=2)
    assert history["val_model_divergence"] == pytest.approx([expected.mean])


class OnABaseModel(keras.Model):
    """A plain model, whose own attribute has the name of one of an NRSModel."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = cnn(compile=False)
        self.head = keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.head(self.base_model(inputs))


@pytest.mark.matrix  # The choice is the same on all backends.
def test_a_plain_model_with_a_base_model_of_its_own() -> None:
    x, y = image_data()
    model = OnABaseModel()
    compile_classifier(model)
    model(x[:1])
    monitor = keras_nrs.callbacks.FlatnessMonitor(x, y)
    recorder = keras_nrs.callbacks.WeightRecorder()
    history = model.fit(x, y, verbose=0, callbacks=[monitor, recorder]).history
    assert "val_eigenvalue" in history
    assert "val_model_divergence" not in history
    assert_equal(recorder.weights[-1], numpy_values(model.trainable_variables))
    schedule = keras_nrs.callbacks.NRSSchedule()
    with pytest.raises(TypeError, match="NRSSchedule needs an NRSModel"):
        model.fit(x, y, verbose=0, callbacks=[schedule])
