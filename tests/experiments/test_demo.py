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
from sklearn.datasets import load_digits

import keras_nrs
from keras_nrs.experiments import demo
from keras_nrs.experiments import tune_demo

SMALL_CNN = demo.small_cnn
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
    """A network that compiles fast; what is tested does not depend on it."""
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
    """Counts trainings instead of doing them, and makes up what is measured."""
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


@pytest.mark.parametrize("train_images", [10, 100, 900])
def test_splits_are_disjoint_and_complete(train_images: int) -> None:
    labels = load_digits().target
    parts = demo.split_indices(labels, train_images=train_images, seed=3)
    assert [len(part) for part in parts] == [train_images, 1000 - train_images, 797]
    assert sorted(np.concatenate(parts)) == list(range(1797))


def test_splits_are_stratified() -> None:
    labels = load_digits().target
    share = np.bincount(labels) / len(labels)
    for part in demo.split_indices(labels, train_images=100, seed=3):
        counts = np.bincount(labels[part], minlength=10)
        # Rounding in both splits moves each class by less than two images.
        np.testing.assert_array_less(np.abs(counts - share * len(part)), 2)


def test_seeds_share_the_test_images_alone() -> None:
    labels = load_digits().target
    first, second = (
        demo.split_indices(labels, train_images=100, seed=seed) for seed in (0, 1)
    )
    np.testing.assert_array_equal(first[2], second[2])
    assert set(first[0]) != set(second[0])


def test_images_are_scaled_and_keep_their_labels() -> None:
    split = demo.load_split(train_images=50, seed=0)
    digits = load_digits()
    train, _, _ = demo.split_indices(digits.target, train_images=50, seed=0)
    assert split.x_train.shape == (50, 8, 8, 1)
    np.testing.assert_array_equal(16 * split.x_train[..., 0], digits.images[train])
    np.testing.assert_array_equal(split.y_train, digits.target[train])
    assert split.x_train.max() == 1


def test_an_epoch_of_batches_holds_each_image_once() -> None:
    x = np.arange(50)
    batches = demo.batches(x, x, seed=0)
    epochs = [np.concatenate([next(batches)[0] for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), x)
    assert not np.array_equal(*epochs)


# Arms.


def test_the_network_has_the_channels_that_its_name_promises() -> None:
    network = SMALL_CNN()
    channels = [
        layer.filters
        for layer in network.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    assert channels == [16, 32, 32]
    assert network.output_shape == (None, 10)


def test_initial_weights_keep_the_variance_of_relu_activations() -> None:
    network = SMALL_CNN()
    weights = demo.initial_weights(network, seed=0)
    assert [w.shape for w in weights] == [tuple(v.shape) for v in network.weights]
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        fan_in = np.prod(kernel.shape[:-1])
        # Four standard errors of the variance of a normal sample.
        tolerance = 4 * np.sqrt(2 / kernel.size)
        assert np.var(kernel) * fan_in / 2 == pytest.approx(1, abs=tolerance)
        assert not bias.any()


def test_all_arms_start_from_the_same_weights() -> None:
    models = [demo.compiled_model(arm, TINY) for arm in demo.ARMS]
    for model in models:
        demo.reset(model, seed=5)
    first, *others = [demo.base_model(model).get_weights() for model in models]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_arms_are_those_of_the_paper_and_their_controls() -> None:
    models = {arm: demo.compiled_model(arm, TINY) for arm in demo.ARMS}
    for arm in (demo.BASELINE, demo.TWICE_THE_LOSS):
        assert not isinstance(models[arm], keras_nrs.NRSModel)
    assert models[demo.RPR].scheme == "rpr"
    alphas = {arm: float(models[arm].alpha.value) for arm in demo.ARMS[3:]}
    assert alphas == {demo.NRS_ALPHA_0: 0.0, demo.NRS: pytest.approx(TINY.alpha)}


def test_twice_the_loss_is_twice_the_loss() -> None:
    x, y = np.zeros((4, 8, 8, 1), "float32"), np.arange(4)
    once, twice = (demo.compiled_model(arm, TINY) for arm in demo.ARMS[:2])
    losses = [float(model.evaluate(x, y, verbose=0)) for model in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


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


def test_eigenvalue_equals_that_of_the_dense_hessian(rng: np.random.Generator) -> None:
    features, logits = rng.normal(size=(30, 4)), rng.normal(size=(30, 3))
    inputs = np.column_stack([features, np.ones(30)])
    hessian = np.zeros((15, 15))
    for h, p in zip(inputs, softmax(logits, axis=1), strict=True):
        hessian += np.kron(np.outer(h, h), np.diag(p) - np.outer(p, p)) / 30
    expected = np.linalg.eigvalsh(hessian)[-1]
    value = demo.last_layer_eigenvalue(features, logits)
    assert value == pytest.approx(expected, rel=1e-9)


def test_accuracy_and_loss_are_those_of_keras() -> None:
    split = demo.load_split(train_images=20, seed=0)
    model = demo.compiled_model(demo.BASELINE, TINY)
    accuracy, loss = demo.accuracy_and_loss(model, split.x_train, split.y_train)
    keras_loss = model.evaluate(split.x_train, split.y_train, verbose=0)
    predicted = model.predict(split.x_train, verbose=0).argmax(axis=1)
    assert loss == pytest.approx(float(keras_loss), rel=1e-5)
    assert accuracy == np.mean(predicted == split.y_train)


def test_model_divergence_is_that_of_the_perturbed_models() -> None:
    x = demo.load_split(train_images=20, seed=0).x_train
    model = _tiny_network()
    model.set_weights(demo.initial_weights(model, seed=0))
    theta = model.get_weights()
    clean = softmax(demo.outputs(model, x), axis=1)
    expected = []
    for seed in range(demo.NUM_DELTAS):
        deltas = keras_nrs.perturbations.RelativeBall().sample(
            [keras.ops.convert_to_tensor(w) for w in theta], 0.4, seed
        )
        numpy_deltas = [keras.ops.convert_to_numpy(delta) for delta in deltas]
        model.set_weights([w + d for w, d in zip(theta, numpy_deltas, strict=True)])
        ratio = clean / softmax(demo.outputs(model, x), axis=1)
        expected.append(np.mean(np.sum(clean * np.log(ratio), axis=1)))
    model.set_weights(theta)
    value = demo.mean_model_divergence(model, x, eps=0.4)
    # float32 logits of order 1, whose rounding the divergence cannot magnify much.
    assert value == pytest.approx(np.mean(expected), rel=1e-4)
    assert demo.mean_model_divergence(model, x, eps=0.0) == pytest.approx(0, abs=1e-6)


# Running, resuming, showing.


def test_each_arm_runs_with_each_seed(finished: Any) -> None:
    _, _, runs = finished
    pairs = [(run.arm, run.seed) for run in runs]
    assert pairs == [(arm, seed) for arm in demo.ARMS for seed in (0, 1)]
    for run in runs:
        assert 0 <= run.test_accuracy <= 1
        assert run.test_loss > 0
        assert run.model_divergence > 0
        assert run.eigenvalue > 0


def test_finished_runs_are_not_repeated(finished: Any, counted: Counted) -> None:
    _, output, runs = finished
    assert _run(output) == runs
    assert counted.calls == 0


def test_a_killed_experiment_goes_on_where_it_was(
    tmp_path: Path, counted: Counted
) -> None:
    counted.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    assert len(_run(tmp_path)) == 10
    assert counted.calls == 4 + 10 - 3


def test_more_seeds_keep_the_finished_runs(tmp_path: Path, counted: Counted) -> None:
    _run(tmp_path, seeds=2)
    assert len(_run(tmp_path, seeds=3)) == 15
    assert counted.calls == 15
    assert len(_run(tmp_path, seeds=2)) == 10


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


def test_both_nrs_arms_keep_their_alpha() -> None:
    experiment = demo.Experiment(TINY, seeds=2, output=Path("unused"))
    model = experiment._model(demo.NRS_ALPHA_0)
    assert float(model.alpha.value) == 0
    assert experiment._model(demo.NRS) is model
    assert float(model.alpha.value) == pytest.approx(TINY.alpha)
    assert experiment._model(demo.RPR) is not model


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"runs": [{"arm": "x"}]}'])
def test_files_of_others_are_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(ValueError, match=r"`output` must be .* Choose another folder"):
        demo.Experiment(TINY, seeds=2, output=tmp_path)
    assert (tmp_path / "runs.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": 9}, "`train_images` must be an integer >= 10"),
        ({"train_images": 901}, "`train_images` must be <= 900.*=901"),
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


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`seeds` must be an integer >= 2"):
        demo.Experiment(TINY, seeds=1, output=tmp_path)


def test_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output` must be a folder"):
        demo.Experiment(TINY, seeds=2, output=tmp_path / "file")


def test_unknown_arm() -> None:
    with pytest.raises(ValueError, match=r"`arm` must be one of .* arm='SAM'"):
        demo.compiled_model("SAM", TINY)


# Choosing the settings.


def test_tuning_uses_seeds_of_its_own_and_the_validation_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []
    monkeypatch.setattr(tune_demo, "train", lambda *a, seed, **k: trained.append(seed))
    monkeypatch.setattr(tune_demo, "accuracy_and_loss", lambda m, x, y: (len(x), 0))
    model = demo.compiled_model(demo.BASELINE, TINY)
    assert tune_demo.validation_accuracy(model, TINY) == 1000 - TINY.train_images
    assert trained == list(tune_demo.SEEDS)
    assert not set(tune_demo.SEEDS) & set(range(100))


def test_both_grids_have_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_demo, "validation_accuracy", lambda *a, **k: 0.5)
    baseline, nrs = tune_demo.tune_baseline(TINY), tune_demo.tune_nrs(TINY)
    assert len(baseline) == len(nrs) == 20


def test_the_grid_marks_the_best_setting() -> None:
    grid = {(0.1, 1.0): 0.91, (0.1, 2.0): 0.93, (0.2, 1.0): 0.92, (0.2, 2.0): 0.9}
    assert tune_demo.best(grid) == (0.1, 2.0)
    console = Console(file=io.StringIO(), width=80)
    console.print(tune_demo.grid_table("title", "eps", "alpha", grid))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "93.00 *" in text
    assert text.count("*") == 1
