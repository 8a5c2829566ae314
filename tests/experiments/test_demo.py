"""The demo: splits, measurements, resuming, table and figure."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from rich.console import Console
from scipy.special import softmax

import keras_nrs
from keras_nrs.divergence_meter import keys_of_samples
from keras_nrs.experiments import demo

TINY = demo.Settings(train_images=20, epochs=2)


def _tiny_network() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(4, activation="relu"),
            layers.Dense(10),
        ]
    )


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    """A network that compiles fast: the tests do not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "small_cnn", _tiny_network)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _tiny: None) -> Any:
    """A whole experiment, done once: the experiment, its folder and its runs."""
    output = tmp_path_factory.mktemp("demo")
    experiment = demo.Experiment(TINY, seeds=2, output=output)
    return experiment, output, experiment.run(Console(file=io.StringIO()))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> "Counted":
    """Counts trainings instead of doing them, and makes up their measurements."""
    measured = dict.fromkeys(
        ("test_accuracy", "test_loss", "model_divergence", "eigenvalue"), 0.5
    )
    counted = Counted()
    monkeypatch.setattr(demo, "train", counted)
    monkeypatch.setattr(demo, "measure", lambda *args: measured)
    return counted


class Counted:
    """Stands in for `train()`: counts, does nothing, and can fail as a kill would."""

    calls = 0
    fail_at = 0

    def __call__(self, model: Any, split: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt


def _run(output: Path, settings: demo.Settings = TINY, *, seeds: int = 2) -> Any:
    experiment = demo.Experiment(settings, seeds=seeds, output=output)
    return experiment.run(Console(file=io.StringIO()))


# Data.


@pytest.mark.only_torch
def test_an_epoch_of_batches_holds_each_image_once() -> None:
    x = np.arange(50)
    batches = demo.batches(x, x, seed=0)
    epochs = [np.concatenate([next(batches)[0] for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), x)
    assert not np.array_equal(*epochs)


# Arms.


@pytest.mark.matrix
def test_all_arms_start_from_the_same_weights() -> None:
    models = [demo.compiled_model(arm, TINY) for arm in demo.ARMS]
    for model in models:
        demo.reset(model, seed=5)
    first, *others = [demo.base_model(model).get_weights() for model in models]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.only_torch
def test_the_arms_are_those_of_the_paper_and_their_controls() -> None:
    models = {arm: demo.compiled_model(arm, TINY) for arm in demo.ARMS}
    for arm in (demo.BASELINE, demo.TWICE_THE_LOSS):
        assert not isinstance(models[arm], keras_nrs.NRSModel)
    assert models[demo.RPR].scheme == "rpr"
    alphas = {arm: float(models[arm].alpha.value) for arm in demo.ARMS[3:]}
    assert alphas == {demo.NRS_ALPHA_0: 0.0, demo.NRS: pytest.approx(TINY.alpha)}


@pytest.mark.only_torch
def test_twice_the_loss_is_twice_the_loss() -> None:
    x, y = np.zeros((4, 8, 8, 1), "float32"), np.arange(4)
    once, twice = (demo.compiled_model(arm, TINY) for arm in demo.ARMS[:2])
    losses = [float(model.evaluate(x, y, verbose=0)) for model in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


@pytest.mark.matrix
def test_a_model_used_again_trains_as_a_new_one(finished: Any) -> None:
    experiment, _, _ = finished
    split = demo.load_split(train_images=20, seed=0)
    model = experiment._model(demo.NRS)
    trained = []
    for seed in (0, 1, 0):
        demo.train(model, split, epochs=2, seed=seed)
        trained.append(keras_nrs.unwrap(model).get_weights())
    for a, b, c in zip(*trained, strict=True):
        np.testing.assert_array_equal(a, c)
        assert not np.array_equal(a, b)


# Measurements.


@pytest.fixture
def network() -> keras.Model:
    """A tiny network with random weights, compiled to be measured."""
    network = _tiny_network()
    network.set_weights(demo.initial_weights(network, seed=0))
    network.compile(loss=demo.crossentropy())
    return network


def _probabilities(network: keras.Model, x: np.ndarray) -> np.ndarray:
    logits = keras.ops.convert_to_numpy(network(x, training=False))
    return softmax(logits.astype("float64"), axis=1)


@pytest.mark.only_torch  # `flatness` has tests on each backend.
def test_eigenvalue_equals_that_of_the_dense_hessian(network: keras.Model) -> None:
    split = demo.load_split(train_images=20, seed=0)
    first = keras.Sequential(network.layers[:-1])
    features = keras.ops.convert_to_numpy(first(split.x_train))
    inputs = np.column_stack([features, np.ones(20)])
    hessian = np.zeros((50, 50))
    for h, p in zip(inputs, _probabilities(network, split.x_train), strict=True):
        hessian += np.kron(np.outer(h, h), np.diag(p) - np.outer(p, p)) / 20
    expected = np.linalg.eigvalsh(hessian)[-1]
    measured = demo.measure(network, split, TINY)
    # The products are computed in float32.
    assert measured["eigenvalue"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.only_torch
def test_model_divergence_is_that_of_the_perturbed_models(network: keras.Model) -> None:
    split = demo.load_split(train_images=20, seed=0)
    theta = network.get_weights()
    clean = _probabilities(network, split.x_train)
    measured = demo.measure(network, split, TINY)
    expected = []
    for key in keys_of_samples(0, demo.NUM_DELTAS):
        deltas = keras_nrs.perturbations.RelativeBall().sample(
            [keras.ops.convert_to_tensor(w) for w in theta], TINY.eps, key
        )
        numpy_deltas = [keras.ops.convert_to_numpy(delta) for delta in deltas]
        network.set_weights([w + d for w, d in zip(theta, numpy_deltas, strict=True)])
        ratio = clean / _probabilities(network, split.x_train)
        expected.append(np.mean(np.sum(clean * np.log(ratio), axis=1)))
    # The logits are float32 and of order 1: their rounding hardly changes the mean.
    assert measured["model_divergence"] == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.only_torch
def test_accuracy_and_loss_are_those_of_keras(network: keras.Model) -> None:
    split = demo.load_split(train_images=20, seed=0)
    accuracy, loss = demo.accuracy_and_loss(network, split.x_train, split.y_train)
    keras_loss = network.evaluate(split.x_train, split.y_train, verbose=0)
    predicted = network.predict(split.x_train, verbose=0).argmax(axis=1)
    assert loss == pytest.approx(float(keras_loss), rel=1e-5)
    assert accuracy == np.mean(predicted == split.y_train)


@pytest.mark.matrix
def test_twice_the_loss_is_measured_like_the_other_arms(finished: Any) -> None:
    """Its own loss weight of 2 would make its eigenvalue twice as large."""
    experiment, _, runs = finished
    split = demo.load_split(train_images=20, seed=0)
    model = experiment._model(demo.TWICE_THE_LOSS)
    demo.train(model, split, epochs=TINY.epochs, seed=0)
    doubled = demo.measure(model, split, TINY)["eigenvalue"]
    (run,) = [r for r in runs if (r.arm, r.seed) == (demo.TWICE_THE_LOSS, 0)]
    assert doubled == pytest.approx(2 * run.eigenvalue, rel=1e-4)


# Running, resuming, showing.


@pytest.mark.matrix
def test_each_arm_runs_with_each_seed(finished: Any) -> None:
    _, _, runs = finished
    pairs = [(run.arm, run.seed) for run in runs]
    assert pairs == [(arm, seed) for arm in demo.ARMS for seed in (0, 1)]
    for run in runs:
        assert 0 <= run.test_accuracy <= 1
        assert run.test_loss > 0
        assert run.model_divergence > 0
        assert run.eigenvalue > 0


@pytest.mark.only_torch
def test_finished_runs_are_not_repeated(finished: Any, counted: Counted) -> None:
    _, output, runs = finished
    assert _run(output) == runs
    assert counted.calls == 0


@pytest.mark.only_torch
def test_a_killed_experiment_goes_on_where_it_was(
    tmp_path: Path, counted: Counted
) -> None:
    counted.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    assert len(_run(tmp_path)) == 10
    assert counted.calls == 4 + 10 - 3


@pytest.mark.only_torch
def test_more_seeds_keep_the_finished_runs(tmp_path: Path, counted: Counted) -> None:
    _run(tmp_path, seeds=2)
    assert len(_run(tmp_path, seeds=3)) == 15
    assert counted.calls == 15
    assert len(_run(tmp_path, seeds=2)) == 10


@pytest.mark.only_torch
def test_a_changed_setting_starts_anew(tmp_path: Path, counted: Counted) -> None:
    _run(tmp_path)
    _run(tmp_path, demo.Settings(train_images=20, epochs=3))
    assert counted.calls == 20
    assert {path.name for path in tmp_path.iterdir()} == {"runs.json", "runs.1.json"}
    content = json.loads((tmp_path / "runs.1.json").read_text())
    assert content["settings"]["epochs"] == 2
    assert len(content["runs"]) == 10
    content = json.loads((tmp_path / "runs.json").read_text())
    assert content["settings"]["epochs"] == 3
    assert len(content["runs"]) == 10


@pytest.mark.only_torch
def test_both_nrs_arms_keep_their_alpha() -> None:
    experiment = demo.Experiment(TINY, seeds=2, output=Path("unused"))
    model = experiment._model(demo.NRS_ALPHA_0)
    assert float(model.alpha.value) == 0
    assert experiment._model(demo.NRS) is model
    assert float(model.alpha.value) == pytest.approx(TINY.alpha)
    assert experiment._model(demo.RPR) is not model


@pytest.mark.only_torch
@pytest.mark.parametrize("text", ["not JSON", "[]", '{"runs": [{"arm": "x"}]}'])
def test_files_of_others_are_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(ValueError, match=r"runs.json.*choose another folder"):
        demo.Experiment(TINY, seeds=2, output=tmp_path)
    assert (tmp_path / "runs.json").read_text() == text


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_accuracy": 93.0}, "`test_accuracy` must be a share from 0 to 1"),
        ({"test_accuracy": "0.9"}, "`test_accuracy` must be a number"),
        ({"eigenvalue": None}, "`eigenvalue` must be a number"),
        ({"arm": "SAM"}, "`arm` must be one of"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"more": 1}, "unexpected keyword"),
        ({}, "the run arm='NRS', seed=0 twice"),
    ],
)
def test_runs_that_cannot_be_right(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    names = ("test_accuracy", "test_loss", "model_divergence", "eigenvalue")
    row = {"arm": "NRS", "seed": 0, **dict.fromkeys(names, 0.5)}
    store = demo.Experiment(TINY, seeds=2, output=tmp_path)._store
    content = {"settings": store._settings, "runs": [row, row | change]}
    store.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"runs\.json' is damaged: .*{message}"):
        demo.Experiment(TINY, seeds=2, output=tmp_path)


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": 9}, "`train_images` must be an integer >= 10"),
        ({"train_images": 901}, "`train_images` must be <= 900 .*=901"),
        ({"epochs": 0}, "`epochs` must be an integer >= 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be > 0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be finite and >= 0"),
        ({"eps": float("nan")}, "`eps` must be finite and >= 0"),
        ({"alpha": -1.0}, "`alpha` must be finite and >= 0"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.Settings(**arguments)


@pytest.mark.only_torch
def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`seeds` must be an integer >= 2"):
        demo.Experiment(TINY, seeds=1, output=tmp_path)


@pytest.mark.only_torch
def test_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output` must be a folder"):
        demo.Experiment(TINY, seeds=2, output=tmp_path / "file")


@pytest.mark.only_torch
def test_unknown_arm() -> None:
    with pytest.raises(ValueError, match=r"`arm` must be one of .* arm='SAM'"):
        demo.compiled_model("SAM", TINY)
