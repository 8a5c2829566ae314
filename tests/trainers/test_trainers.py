"""What the trainers of all backends do: compiled steps, data, modes."""

import functools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import flatness
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import PyDataset
from tests.support.data import data_loader
from tests.support.data import endless_generator
from tests.support.data import image_data
from tests.support.data import tf_dataset
from tests.support.faults import linear_classifier
from tests.support.faults import normal_data
from tests.support.matrix import rest
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.precision import precision
from tests.support.processes import run_python
from tests.support.run_time import count_at_run_time
from tests.support.run_time import wait_for_device

NRS = {"eps": 1.0, "seed": 0}


def test_data_formats_give_the_same_training() -> None:
    x, y = image_data(32)
    formats: dict[str, dict[str, Any]] = {
        "arrays": {"x": x, "y": y, "batch_size": 8},
        "generator": {"x": endless_generator(x, y), "steps_per_epoch": 4},
        "PyDataset": {"x": PyDataset(x, y)},
        "tf.data": {"x": tf_dataset(x, y)},
        "DataLoader": {"x": data_loader(x, y)},
    }
    nrs = keras_nrs.wrap(cnn(), eps=1.0, seed=0)
    nrs.optimizer.build(nrs.trainable_variables)
    variables = [*nrs.variables, *nrs.optimizer.variables]
    start = numpy_values(variables)
    results = {}
    for name, arguments in formats.items():
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        nrs.fit(**arguments, shuffle=False, epochs=2, verbose=0)
        results[name] = nrs.get_weights()
    for name in formats:
        for a, b in zip(results[name], results["arrays"], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    "compiled_with", [{"run_eagerly": True}, {"jit_compile": True}], ids=str
)
def test_execution_modes(compiled_with: dict[str, bool]) -> None:
    if keras.config.backend() == "torch" and "jit_compile" in compiled_with:
        # `torch.compile` takes a minute: `tests/compatibility` has it.
        compiled_with = {"jit_compile": False}
    x, y = image_data(48)
    model = cnn(batch_norm=False, compile=False)
    compile_classifier(model, **compiled_with)
    nrs = keras_nrs.wrap(model, interval=2, **NRS)
    name, value = next(iter(compiled_with.items()))
    assert getattr(nrs, name) is value
    history = nrs.fit(x, y, batch_size=16, verbose=0).history
    assert history["model_divergence"][0] > 0


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_that_turns_out_to_have_no_weights() -> None:
    """It is built in `fit()`, and its steps count batches."""

    class Counter(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.batches = self.add_variable((), "zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.batches.assign(self.batches + 1)
            return x

    model = Counter()
    model.compile("sgd", "mse")
    x = np.ones((8, 1), "float32")
    history = keras_nrs.wrap(model).fit(x, 2 * x, batch_size=2, verbose=0).history
    assert history["loss"] == [1.0]
    assert float(model.batches) == 4


@pytest.mark.only_jax
@pytest.mark.only_tensorflow  # Keras has no steps_per_execution on PyTorch.
def test_steps_per_execution() -> None:
    """Five steps in executions of two are five single steps."""
    x, y = image_data(80)

    def weights(steps: int) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = cnn(dropout=0.2, compile=False)
        compile_classifier(model, steps_per_execution=steps)
        nrs = keras_nrs.wrap(model, interval=2, **NRS)
        assert nrs.steps_per_execution == steps
        nrs.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        return numpy_values(model.variables)

    assert_equal(weights(1), weights(2))


@pytest.mark.parametrize("policy", ["mixed_float16", *rest("mixed_bfloat16")])
@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 0.3, "perturbation": "filterwise"},
        *rest(
            {"eps": 2.0, "perturbation": "ball"},
            {"eps": 0.3, "perturbation": "elementwise"},
        ),
    ],
)
def test_mixed_precision(policy: str, arguments: dict[str, Any]) -> None:
    x, y = image_data()
    keras.config.set_dtype_policy(policy)
    try:
        model = cnn(dropout=0.2, compile=False)
        nrs = keras_nrs.wrap(model, seed=0, **arguments)
        compile_classifier(nrs)
    finally:
        keras.config.set_dtype_policy("float32")
    is_scaled = isinstance(nrs.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    assert nrs.dtype_policy.name == policy
    before = model.get_weights()
    history = nrs.fit(x, y, batch_size=16, epochs=3, verbose=0).history
    # The logs are unscaled.
    assert 0 < history["model_divergence"][-1] < 10
    assert 0 < history["loss"][-1] < 20
    assert not np.array_equal(before[0], model.get_weights()[0])


def test_weights_in_bfloat16() -> None:
    """`set_floatx("bfloat16")`, as guides to large language models have it."""
    x, y = image_data()

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.evaluate(x, y, verbose=0)

    with precision("bfloat16"):
        model = cnn(batch_norm=False)
        nrs = keras_nrs.wrap(model, eps=0.4, seed=0)
        logs = nrs.fit(x, y, verbose=0, callbacks=[Evaluate()]).history
        sharpness = flatness.sharpness(model, x, y, eps=0.4)
        line = flatness.loss_landscape(model, x, y, directions=1, num_points=3)
    assert all(w.dtype == "bfloat16" for w in model.trainable_weights)
    assert 0 < float(logs["loss"][0]) < 20
    assert 0 < sharpness.loss < 20
    assert np.isfinite(line.losses).all()


def test_gradient_accumulation_and_ema() -> None:
    """Four steps of a fourth of the batch are one step, and each has its delta."""
    x, y = image_data(64)

    def weights(
        batch_size: int, epochs: int = 1, **options: Any
    ) -> tuple[list[np.ndarray], Any]:
        keras.utils.set_random_seed(0)
        model = cnn(batch_norm=False, compile=False)
        compile_classifier(model, optimizer=keras.optimizers.SGD(0.1, **options))
        nrs = keras_nrs.wrap(model, eps=0.2, perturbation=FixedPerturbation())
        nrs.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
        return model.get_weights(), nrs

    whole, _ = weights(64)
    accumulated, nrs = weights(16, gradient_accumulation_steps=4)
    assert int(nrs.optimizer.iterations) == 1
    assert numpy_values([nrs.seed_generator.state])[0][1] == 4
    for a, b in zip(whole, accumulated, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The average starts at the first step, and `fit` leaves it in the weights.
    twice, _ = weights(64, epochs=2)
    ema, _ = weights(64, epochs=2, use_ema=True, ema_momentum=0.75)
    for a, b, c in zip(whole, twice, ema, strict=True):
        np.testing.assert_allclose(0.75 * a + 0.25 * b, c, atol=1e-6)


def twenty_steps() -> tuple[list[Any], dict[str, list[float]]]:
    """Weights and history, from weights that are the same on each backend."""
    x, y = image_data(64)
    model = cnn()
    rng = np.random.default_rng(0)
    model.set_weights(
        [0.3 * rng.normal(size=w.shape) + (w.mean() == 1) for w in model.get_weights()]
    )
    bn = model.layers[1]
    bn.moving_mean.assign(np.zeros(4))
    bn.moving_variance.assign(np.ones(4))
    nrs = keras_nrs.wrap(model, eps=0.05, perturbation=FixedPerturbation())
    history = nrs.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0).history
    return [w.tolist() for w in model.get_weights()], history


ELSEWHERE = """
import json
from tests.trainers.test_trainers import twenty_steps
print(json.dumps(twenty_steps()))
"""


@pytest.mark.only_jax  # The test starts the other backends itself.
def test_three_backends_reach_the_same_weights() -> None:
    weights, history = twenty_steps()
    assert history["model_divergence"][-1] > 1e-3
    for backend in ("tensorflow", "torch"):
        output = run_python(ELSEWHERE, backend=backend)
        other_weights, other_history = json.loads(output.splitlines()[-1])
        # 20 steps, each of which rounds 1,000-term sums of order-one numbers and
        # passes on the errors of the last one, doubled at the most every 5 steps.
        bound = 16 * 1000 * ROUNDING
        for a, b in zip(weights, other_weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
        for name, values in history.items():
            np.testing.assert_allclose(values, other_history[name], rtol=bound)


@functools.cache
def trained(kind: str, **arguments: Any) -> tuple[Any, Any, Any]:
    """Variables, history and the model itself: plain without arguments of `wrap()`."""
    x, y = image_data(40)
    keras.utils.set_random_seed(3)
    if kind == "sequential":
        model = cnn(dropout=0.5, penalty=1e-3)
    else:
        model = Subclassed()
        compile_classifier(model)
    trained = keras_nrs.wrap(model, **arguments) if arguments else model
    history = trained.fit(
        x, y, batch_size=16, epochs=3, validation_split=0.2, verbose=0
    ).history
    variables = model.variables + model.optimizer.variables
    return numpy_values(variables), history, trained


@pytest.mark.parametrize(
    "arguments", [{"scheme": "baseline"}, {"eps": 0.0, "alpha": 0.0, "beta": 0.0}]
)
@pytest.mark.parametrize("kind", ["sequential", *rest("subclassed")])
def test_nothing_regularized_is_bare_keras(
    kind: str, arguments: dict[str, Any]
) -> None:
    """Bit for bit, with dropout, BatchNorm, a penalty and validation."""
    bare_values, bare_history, _ = trained(kind)
    values, history, nrs = trained(kind, **arguments)
    assert_equal(values, bare_values)
    assert {name: history[name] for name in bare_history} == bare_history
    extra = set(history) - set(bare_history)
    assert extra == {tracker.name for tracker in nrs._trackers}


def test_interval_skips_the_perturbed_pass_at_run_time() -> None:
    """Counted by a perturbation that calls back into Python."""
    calls: list[int] = []

    class Counting(keras_nrs.perturbations.Perturbation):
        def sample(self, weights: Any, eps: Any, rng: Any) -> Any:
            count_at_run_time(calls)
            return [keras.ops.zeros(w.shape) for w in weights]

    x, y = image_data(80)
    nrs = keras_nrs.wrap(cnn(), eps=0, perturbation=Counting(), interval=4)
    nrs.fit(x, y, batch_size=10, verbose=0)
    wait_for_device()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "arguments", [{"perturbations_per_replica": 2}, *rest({"perturbed_fraction": 0.5})]
)
def test_steps_that_interval_leaves_out_are_bare_keras(arguments: Any) -> None:
    """In one batch, without groups of their own for BatchNorm."""
    x, y = image_data(32)

    def logs(**arguments: Any) -> tuple[float, list[np.ndarray]]:
        keras.utils.set_random_seed(0)
        model = cnn(dropout=0.5, seed=1)
        trained = keras_nrs.wrap(model, **arguments) if arguments else model
        if arguments:
            trained.seed_generator.next()
        loss = trained.train_on_batch(x, y, return_dict=True)["loss"]
        return float(loss), numpy_values(model.variables)

    (loss, values), (bare_loss, bare_values) = logs(interval=2, **arguments), logs()
    # Sums of 1,000 terms: on TensorFlow their order may differ from plain Keras's.
    bound = 1000 * ROUNDING
    assert loss == pytest.approx(bare_loss, rel=bound)
    for value, bare in zip(values, bare_values, strict=True):
        np.testing.assert_allclose(value, bare, rtol=bound, atol=bound)


def fit_in_intervals(**arguments: Any) -> list[np.ndarray]:
    """Four steps in an epoch, of which every third is perturbed."""
    x, y = image_data(32)
    keras.utils.set_random_seed(0)
    nrs = keras_nrs.wrap(
        cnn(batch_norm=False), eps=0.5, perturbation="relative", interval=3, seed=1
    )
    compile_classifier(nrs, optimizer=keras.optimizers.SGD(0.05))
    nrs.fit(x, y, batch_size=8, shuffle=False, verbose=0, **arguments)
    return numpy_values(nrs.trainable_variables)


@functools.cache
def weights_after_epochs() -> list[list[np.ndarray]]:
    """Those of three epochs without any stop."""
    weights: list[list[np.ndarray]] = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            weights.append(numpy_values(self.model.trainable_variables))

    fit_in_intervals(epochs=3, callbacks=[Note()])
    return weights


def test_interval_goes_on_where_a_backup_stopped(tmp_path: Path) -> None:
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit_in_intervals(epochs=1, callbacks=[backup])
    resumed = fit_in_intervals(epochs=3, callbacks=[backup])
    assert_equal(resumed, weights_after_epochs()[2])


@pytest.mark.parametrize("when", ["on_epoch_begin", *rest("on_train_batch_end")])
def test_interval_follows_weights_that_a_callback_loads(
    when: str, tmp_path: Path
) -> None:
    """A second epoch that begins with the weights of the first is the first again."""
    path = tmp_path / "start.weights.h5"

    class Restart(keras.callbacks.Callback):
        calls = 0

        def on_train_begin(self, logs: Any = None) -> None:
            self.model.save_weights(path)

        def load(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if self.calls == {"on_epoch_begin": 2, "on_train_batch_end": 4}[when]:
                self.model.load_weights(path)

    callback = Restart()
    setattr(callback, when, callback.load)
    weights = fit_in_intervals(epochs=2, callbacks=[callback])
    assert_equal(weights, weights_after_epochs()[0])


def test_eps_and_alpha_take_effect_without_retracing() -> None:
    traces: list[int] = []

    class Counting(keras_nrs.perturbations.Ball):
        def sample(self, weights: Any, eps: Any, rng: Any) -> Any:
            traces.append(1)
            return super().sample(weights, eps, rng)

    class Assign(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.model.eps = 0.0 if batch < 3 else 2.0
            self.model.alpha.assign(0.5)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(float(logs["model_divergence"]))

    seen: list[float] = []
    x, y = image_data(64)
    nrs = keras_nrs.wrap(cnn(), eps=1.0, perturbation=Counting())
    nrs.fit(x, y, batch_size=8, verbose=0, callbacks=[Assign()])
    # JAX compiles without a part of XLA here, and rounds the two passes otherwise.
    is_jax = keras.config.backend() == "jax"
    assert abs(seen[2]) <= (ROUNDING if is_jax else 0)
    assert seen[3] > 100 * ROUNDING
    assert float(keras.ops.convert_to_numpy(nrs.eps.value)) == 2.0
    assert float(keras.ops.convert_to_numpy(nrs.alpha.value)) == 0.5
    if keras.config.backend() != "torch":  # which runs eagerly
        assert len(traces) <= 2  # Keras traces once more where shapes are unknown


@pytest.mark.parametrize(
    "options", [{}, *rest({"scheme": "rpr"}, {"memory_efficient": True})]
)
@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
def test_each_pass_is_traced_once(options: dict[str, Any], train: str) -> None:
    """Also where the optimizer and metrics given by name are not built before."""
    calls: list[Any] = []

    class Counting(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            calls.append(x)
            return x

    layers = keras.layers
    model = keras.Sequential([keras.Input((4,)), Counting(), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    nrs = keras_nrs.wrap(model, **options)
    calls.clear()
    getattr(nrs, train)(np.ones((8, 4), "float32"), np.arange(8) % 3)
    num_passes = 1 if "scheme" in options else 3 if options else 2
    # Keras builds metrics and the loss. On TensorFlow random draws are looked for,
    # unless there is but one pass.
    num_others = 1
    if keras.config.backend() == "tensorflow":
        num_others += num_passes > 1
    assert len(calls) == num_others + num_passes


def test_same_seed_same_run_and_other_seed_other_run() -> None:
    x, y = normal_data(64)

    def weights(seed: int | None, global_seed: int = 0) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = linear_classifier()
        keras.utils.set_random_seed(global_seed)
        nrs = keras_nrs.wrap(model, eps=0.5, seed=seed)
        nrs.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return numpy_values(model.variables)

    seeded, unseeded = weights(7), weights(None)
    assert_equal(seeded, weights(7, global_seed=1))
    assert_equal(unseeded, weights(None))
    assert not np.array_equal(seeded[0], weights(8)[0])
    assert not np.array_equal(unseeded[0], weights(None, global_seed=1)[0])


def test_metrics_of_a_loss_see_the_weights_before_the_step() -> None:
    class Measured(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = keras.layers.Dense(1)
            self.size = keras.metrics.Mean(name="size")

        def call(self, x: Any) -> Any:
            return self.head(x)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.size.update_state(keras.ops.sum(self.head.bias))
            return super().compute_loss(*args, **kwargs)

    def sizes(wraps: bool) -> list[float]:
        keras.utils.set_random_seed(0)
        model = Measured()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = np.ones((8, 3), "float32")
        trained = keras_nrs.wrap(model, eps=0.0, normalize=True) if wraps else model
        history = trained.fit(x, 5 + x[:, :1], batch_size=2, epochs=2, verbose=0)
        found: list[float] = history.history["size"]
        return found

    assert sizes(True) == pytest.approx(sizes(False), rel=1e-5)
