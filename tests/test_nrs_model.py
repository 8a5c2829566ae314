"""`wrap`, `unwrap` and `NRSModel`: the habits of Keras."""

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
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation

NRS = {"eps": 1.0, "seed": 0}


def functional_with_two_outputs() -> keras.Model:
    """Two named inputs, a class and a regression output, as dicts."""
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
    hidden = layers.Concatenate()(list(inputs.values()))
    hidden = layers.Dense(8, activation="tanh")(hidden)
    outputs = {
        "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    return keras.Model(inputs, outputs)


def test_wrap_shares_everything_with_the_users_model() -> None:
    model = cnn()
    nrs = keras_nrs.wrap(model)
    assert isinstance(nrs, keras.Model)
    assert keras_nrs.unwrap(nrs) is nrs.base_model is model
    assert nrs.optimizer is model.optimizer
    assert nrs.loss is model.loss
    assert nrs.compiled
    assert [id(w) for w in nrs.weights] == [id(w) for w in model.weights]
    assert nrs.count_params() == model.count_params()


@pytest.mark.matrix
def test_compiled_model_keeps_its_optimizer_slots() -> None:
    x, y = image_data()
    model = cnn()
    model.fit(x, y, verbose=0)
    slots = numpy_values(model.optimizer.variables)
    nrs = keras_nrs.wrap(model, **NRS)
    assert_equal(numpy_values(nrs.optimizer.variables), slots)
    nrs.fit(x, y, batch_size=32, verbose=0)
    assert int(nrs.optimizer.iterations) == 2 + 2


def test_the_users_model_goes_on_without_nrs() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), **NRS)
    nrs.fit(x, y, batch_size=32, verbose=0)
    model = keras_nrs.unwrap(nrs)
    logs = model.fit(x, y, batch_size=32, verbose=0).history
    assert "perturbed_loss" not in logs
    assert int(model.optimizer.iterations) == 2 + 2


@pytest.mark.matrix
def test_eps_and_alpha_of_zero_minimize_the_users_loss() -> None:
    x, y = image_data()
    losses = []
    for is_wrapped in (False, True):
        keras.utils.set_random_seed(0)
        model = cnn()
        if is_wrapped:
            model = keras_nrs.wrap(model)
            model.eps = model.alpha = 0
        losses.append(model.fit(x, y, epochs=2, shuffle=False, verbose=0).history)
    np.testing.assert_allclose(losses[1]["loss"], losses[0]["loss"], rtol=1e-5)
    np.testing.assert_array_equal(losses[1]["model_divergence"], 0)


@pytest.mark.matrix
def test_plain_python_loss_and_metric() -> None:
    def my_loss(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    def mean_logit(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(y_pred)

    x, y = image_data()
    model = cnn(compile=False)
    model.compile("sgd", loss=my_loss, metrics=[mean_logit])
    nrs = keras_nrs.wrap(model, **NRS)
    logs = nrs.fit(x, y, verbose=0, validation_split=0.25).history
    assert list(logs) == [
        "loss",
        "mean_logit",
        "model_divergence",
        "perturbed_loss",
        "val_loss",
        "val_mean_logit",
    ]
    assert logs["model_divergence"][0] > 0


@pytest.mark.matrix
def test_compile_after_wrap_compiles_the_base_model() -> None:
    x, y = image_data()
    model = cnn(compile=False)
    nrs = keras_nrs.wrap(model, **NRS)
    assert not nrs.compiled
    with pytest.raises(ValueError, match="must call `compile"):
        nrs.fit(x, y)
    compile_classifier(nrs)
    nrs.fit(x, y, verbose=0)
    assert model.compiled
    # Compiled anew on either side, the next fit uses it.
    model.compile("adam", loss=model.loss, metrics=["accuracy"])
    nrs.fit(x, y, verbose=0, batch_size=32)
    assert isinstance(nrs.optimizer, keras.optimizers.Adam)
    assert int(model.optimizer.iterations) == 2


def test_evaluate_and_predict_equal_the_base_model_bit_for_bit() -> None:
    x, y = image_data()
    model = cnn(dropout=0.5, penalty=0.1)
    nrs = keras_nrs.wrap(model, **NRS)
    nrs.fit(x, y, verbose=0)
    assert nrs.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    assert nrs.test_on_batch(x, y) == model.test_on_batch(x, y)
    assert_equal(
        [nrs.predict(x, verbose=0), nrs.predict_on_batch(x)],
        [model.predict(x, verbose=0), model.predict_on_batch(x)],
    )
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(nrs(x, training=False)),
        keras.ops.convert_to_numpy(model(x, training=False)),
    )


@pytest.mark.matrix
def test_logs() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), **NRS)
    history = nrs.fit(x, y, validation_data=(x, y), verbose=0).history
    training = {"loss", "accuracy", "model_divergence", "perturbed_loss"}
    assert set(history) == training | {"val_loss", "val_accuracy"}
    assert set(nrs.train_on_batch(x, y, return_dict=True)) == training
    assert set(nrs.evaluate(x, y, return_dict=True, verbose=0)) == {"loss", "accuracy"}
    names = [metric.name for metric in nrs.metrics]
    assert names[-2:] == ["model_divergence", "perturbed_loss"]


@pytest.mark.matrix
def test_logs_are_means_over_the_epoch() -> None:
    """Weighted by batch size, as Keras's loss is."""
    x, y = image_data(40)
    nrs = keras_nrs.wrap(
        cnn(batch_norm=False), eps=0.5, perturbation=FixedPerturbation()
    )
    nrs.optimizer.learning_rate = 0.0
    epoch = nrs.fit(x, y, batch_size=32, verbose=0).history
    whole = nrs.fit(x, y, batch_size=40, verbose=0).history
    for name in ("loss", "model_divergence", "perturbed_loss"):
        assert epoch[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.matrix
def test_functional_with_dicts() -> None:
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(32, 4)), "b": rng.normal(size=(32, 3))}
    y = {"kind": rng.integers(0, 3, 32), "size": rng.normal(size=(32, 1))}
    model = functional_with_two_outputs()
    model.compile(
        "sgd",
        loss={"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": ["accuracy"]},
    )
    bare = set(model.fit(x, y, verbose=0).history)
    history = keras_nrs.wrap(model, **NRS).fit(x, y, verbose=0).history
    assert set(history) == bare | {"model_divergence", "perturbed_loss"}
    assert history["model_divergence"][0] > 0


@pytest.mark.matrix
@pytest.mark.parametrize("outputs", [["kind", "size"], ["kind"]])
def test_functional_with_lists(outputs: list[str]) -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(32, 4)), rng.normal(size=(32, 3))]
    labels = {"kind": rng.integers(0, 3, 32), "size": rng.normal(size=(32, 1))}
    of_dicts = functional_with_two_outputs()
    model = keras.Model(
        list(of_dicts.input.values()), [of_dicts.output[name] for name in outputs]
    )
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile("sgd", loss=[losses[name] for name in outputs])
    y = [labels[name] for name in outputs]
    history = keras_nrs.wrap(model, **NRS).fit(x, y, verbose=0).history
    assert history["model_divergence"][0] > 0


def test_subclassed_model_builds_in_fit() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(Subclassed(), **NRS)
    compile_classifier(nrs)
    history = nrs.fit(x, y, epochs=2, verbose=0).history
    assert nrs.built
    assert nrs.base_model.built
    assert history["model_divergence"][0] > 0


def test_base_model_with_its_own_loss_metrics_and_test_step() -> None:
    class Own(Subclassed):
        def __init__(self) -> None:
            super().__init__()
            self.largest = keras.metrics.Mean(name="largest")

        def compute_loss(
            self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool = True
        ) -> Any:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 0.1 * keras.ops.mean(y_pred**2)

        def compute_metrics(
            self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
        ) -> Any:
            self.largest.update_state(keras.ops.max(y_pred))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    x, y = image_data()
    model = Own()
    compile_classifier(model)
    nrs = keras_nrs.wrap(model, eps=0.0)
    model.optimizer.learning_rate = 0.0
    history = nrs.fit(x, y, validation_data=(x, y), verbose=0).history
    assert history["largest"] == pytest.approx(history["val_largest"], rel=0.5)
    assert history["loss"] == pytest.approx(history["val_loss"], rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("groups", [2, 1])
def test_metrics_of_the_base_models_own_loss(groups: int) -> None:
    """They are told the loss of the clean pass, with the losses of layers."""

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2, activity_regularizer="l2")
            self.whole = keras.metrics.Mean(name="whole")
            self.of_layers = keras.metrics.Mean(name="of_layers")

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.whole.update_state(loss)
            self.of_layers.update_state(sum(self.losses))
            return loss

    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    logs = []
    for wrapped in (False, True):
        keras.utils.set_random_seed(0)
        model = Own()
        model.compile("sgd", "mse")
        if wrapped:
            model = keras_nrs.wrap(
                model, eps=0.0, normalize=True, perturbations_per_replica=groups
            )
        logs.append(model.train_on_batch(x, y, return_dict=True))
    plain, nrs = logs
    assert plain["of_layers"] > 0
    for name in plain:
        assert float(nrs[name]) == pytest.approx(float(plain[name]), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("part", ["wrapped", *rest("base")])
def test_quantizing_after_predict_reaches_both(part: str) -> None:
    x, _ = image_data()
    nrs = keras_nrs.wrap(cnn(), **NRS)
    before = nrs.predict(x, verbose=0)
    assert_equal([before], [nrs.base_model.predict(x, verbose=0)])
    (nrs if part == "wrapped" else nrs.base_model).quantize("int8")
    after = nrs.predict(x, verbose=0)
    assert_equal([after], [nrs.base_model.predict(x, verbose=0)])
    assert np.abs(after - before).max() > 0


@pytest.mark.matrix
def test_keras_callbacks_reach_the_model(tmp_path: Any) -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(), **NRS)
    path = str(tmp_path / "checkpoint.keras")
    history = nrs.fit(
        x,
        y,
        epochs=3,
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch)),
            keras.callbacks.ModelCheckpoint(path),
            keras.callbacks.EarlyStopping("loss", patience=0, min_delta=100.0),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        ],
    ).history
    assert len(history["loss"]) == 2
    assert "model_divergence" in (tmp_path / "log.csv").read_text().splitlines()[0]
    assert isinstance(keras.saving.load_model(path), keras_nrs.NRSModel)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"eps": -0.1}, ValueError, "`eps` must be finite and >= 0"),
        ({"eps": float("nan")}, ValueError, "`eps`"),
        ({"eps": "0.1"}, TypeError, "`eps` must be a number"),
        ({"alpha": -1.0}, ValueError, "`alpha`"),
        ({"beta": float("inf")}, ValueError, "`beta`"),
        ({"scheme": "sharp"}, ValueError, r"`scheme` must be one of \['nrs', 'rpr'"),
        ({"perturbation": "box"}, ValueError, "`perturbation` must be one of"),
        ({"divergence": "kl"}, ValueError, "`divergence` must be 'auto'"),
        ({"divergence": np.zeros(2)}, ValueError, "`divergence` must be 'auto'"),
        ({"perturbation": keras_nrs.perturbations.Ball}, ValueError, "not the class"),
        ({"seed": 2**31}, ValueError, "`seed` must be an integer from 0"),
        ({"interval": 0}, ValueError, "`interval` must be an integer >= 1"),
        ({"interval": 1.5}, TypeError, "`interval` must be an integer"),
        ({"normalize": 1}, TypeError, "`normalize`"),
        ({"perturbed_fraction": 0}, ValueError, "`perturbed_fraction` must be > 0"),
        ({"perturbed_fraction": 1.5}, ValueError, "`perturbed_fraction` must be > 0"),
        ({"memory_efficient": "yes"}, TypeError, "`memory_efficient`"),
        ({"clean_pass": 1}, TypeError, "`clean_pass`"),
        ({"clean_pass": True}, ValueError, "`clean_pass` must be False with schemes"),
        (
            {"scheme": "rpr", "perturbed_fraction": 0.5},
            ValueError,
            "`perturbed_fraction` must be 1 with scheme='rpr'",
        ),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"seed": "a"}, TypeError, "`seed`"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        keras_nrs.wrap(cnn(), **arguments)


@pytest.mark.matrix
def test_bad_models() -> None:
    class OwnStep(Subclassed):
        def train_step(self, *args: Any) -> Any:
            raise NotImplementedError

    class OwnFit(Subclassed):
        def fit(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        keras_nrs.wrap(layers.Dense(3))
    with pytest.raises(ValueError, match="wrapped already"):
        keras_nrs.wrap(keras_nrs.wrap(cnn()))
    with pytest.raises(ValueError, match="nrs_objective"):
        keras_nrs.wrap(OwnStep())
    with pytest.warns(UserWarning, match="overrides fit"):
        keras_nrs.wrap(OwnFit())
    with pytest.raises(TypeError, match="must be an NRSModel"):
        keras_nrs.unwrap(cnn())


@pytest.mark.matrix
def test_options_cannot_be_assigned() -> None:
    nrs = keras_nrs.wrap(cnn())
    for name in ("beta", "scheme", "perturbation", "interval", "memory_efficient"):
        with pytest.raises(AttributeError, match=f"`{name}` is set by wrap"):
            setattr(nrs, name, None)


@pytest.mark.matrix
def test_a_wrapped_model_in_another_one_says_that_it_is_not_regularized() -> None:
    x, y = image_data(16)
    outer = keras.Sequential([keras.Input((6, 6, 1)), keras_nrs.wrap(cnn())])
    compile_classifier(outer)
    with pytest.warns(UserWarning, match="is not regularized where"):
        outer.fit(x, y, verbose=0)


@pytest.mark.matrix
def test_summary_and_layers_are_the_base_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nrs = keras_nrs.wrap(cnn())
    nrs.summary()
    wrapped = capsys.readouterr().out
    nrs.base_model.summary()
    assert wrapped.startswith(capsys.readouterr().out)
    assert nrs.get_layer(index=0) is nrs.base_model.layers[0]


@pytest.mark.matrix
def test_an_eps_of_another_perturbation() -> None:
    x, _ = image_data(16)
    model = cnn()
    eps = keras_nrs.calibrate_eps(
        model, x, target_divergence=0.1, perturbation="relative", num_samples=2
    )
    with pytest.raises(ValueError, match=r"found for a RelativeBall, .*Ball"):
        keras_nrs.wrap(model, eps=eps, perturbation="ball")
    keras_nrs.wrap(model, eps=eps)
    keras_nrs.wrap(model, eps=float(eps))


@pytest.mark.matrix
def test_the_legacy_format_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="unwrap"):
        keras_nrs.wrap(cnn()).save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_frozen_model_trains_as_in_keras() -> None:
    """That is, with a warning where Keras warns."""
    x, y = image_data()
    model = cnn(batch_norm=False)
    model.trainable = False
    compile_classifier(model)
    nrs = keras_nrs.wrap(model)
    weights = model.get_weights()
    if keras.config.backend() == "jax":
        nrs.fit(x, y, verbose=0)
    else:
        with pytest.warns(UserWarning, match="does not have any trainable"):
            nrs.fit(x, y, verbose=0)
    assert_equal(model.get_weights(), weights)


def test_scalar_tensors_may_be_assigned() -> None:
    nrs = keras_nrs.wrap(cnn(), eps=np.array(0.5))
    nrs.alpha = keras.ops.convert_to_tensor(0.25)
    assert nrs.get_config()["eps"] == 0.5
    assert nrs.get_config()["alpha"] == 0.25


@pytest.mark.matrix
def test_bad_assignments() -> None:
    nrs = keras_nrs.wrap(cnn())
    with pytest.raises(ValueError, match="`eps`"):
        nrs.eps = -1.0
    with pytest.raises(TypeError, match="`alpha`"):
        nrs.alpha = "1"


@pytest.mark.parametrize("make", [lambda: cnn(compile=False), *rest(Subclassed)])
@pytest.mark.parametrize("as_plain", [False, *rest(True)])
def test_loss_without_a_known_divergence(make: Any, as_plain: bool) -> None:
    """The advice of the error can be followed, and the model trains without NRS too."""
    x, y = image_data()
    model = make()
    model.compile("adam", loss="categorical_hinge")
    nrs = keras_nrs.wrap(model)
    with pytest.raises(ValueError, match="divergence='auto' knows no divergence"):
        nrs.fit(x, np.eye(3)[y], verbose=0)
    weights = numpy_values(model.trainable_variables)
    with pytest.raises(ValueError, match="divergence='auto' knows no divergence"):
        nrs.train_on_batch(x, np.eye(3)[y])
    assert_equal(numpy_values(model.trainable_variables), weights)
    if as_plain:
        assert np.isfinite(model.fit(x, np.eye(3)[y], verbose=0).history["loss"]).all()
        return
    kl = keras_nrs.divergences.CategoricalKL(from_logits=True)
    nrs = keras_nrs.wrap(keras_nrs.unwrap(nrs), divergence=kl, **NRS)
    history = nrs.fit(x, np.eye(3)[y], verbose=0).history
    assert history["model_divergence"][0] > 0


class FailsOnce(layers.Layer):
    """Raises in its first pass of a training step."""

    has_failed = False

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training and not self.has_failed:
            self.has_failed = True
            raise ValueError("The first step fails.")
        return inputs


def test_an_error_in_the_first_step_leaves_the_model_as_it_was() -> None:
    """With BatchNorm, and an optimizer with slots: as if there had been no call."""
    x, y = image_data(32)

    def run(*, fails: bool) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        layer = FailsOnce()
        layer.has_failed = not fails
        model = keras.Sequential([cnn(compile=False), layer])
        # Metrics and slots are made in the first step.
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        nrs = keras_nrs.wrap(model, eps=0.0)
        if fails:
            with pytest.raises(ValueError, match=r"The first step fails\."):
                nrs.fit(x, y, verbose=0)
        nrs.fit(x, y, epochs=2, shuffle=False, verbose=0)
        return numpy_values(model.variables + model.optimizer.variables)

    assert_equal(run(fails=True), run(fails=False))
