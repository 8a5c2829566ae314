"""The command `keras-nrs`.

Most of it does not depend on the backend, and is tested where it starts soonest.
"""

import errno
import re
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import keras_nrs.experiments
from keras_nrs import cli
from keras_nrs._digits import load_digits
from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError
from keras_nrs.experiments import demo
from keras_nrs.tuning import settings
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

DIGITS = "digits-wide_resnet_10_1-none-baseline"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Leaves training and measuring out; lists the trainings instead."""
    calls: list[Any] = []
    measured = dict.fromkeys(
        ("test_accuracy", "test_loss", "model_divergence", "eigenvalue"), 0.5
    )
    monkeypatch.setattr(demo, "measure", lambda *args: measured)
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: calls.append(kwargs))
    return calls


def _demo(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["demo", "--data", "digits", *arguments])


@pytest.mark.only_torch
def test_demo_prints_a_table_and_writes_its_files(
    tmp_path: Path, no_training: list[Any]
) -> None:
    options = ["--seeds", "2", "--epochs", "3", "--train-images", "20"]
    result = _demo(*options, "--output", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert len(no_training) == 10
    assert all(call["epochs"] == 3 for call in no_training)
    for arm in ("RPR", "NRS", "baseline"):
        assert arm in result.output
    assert "Data: Handwritten digits, from scikit-learn." in result.output
    assert "Decision: keep the baseline on these data" in result.output
    assert result.output.splitlines()[-1].startswith("keras-nrs tune ")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "demo.png",
        "runs.json",
    }
    again = _demo(*options, "--output", str(tmp_path / "new"))
    assert len(no_training) == 10
    assert "10 runs are in" in again.output


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "1", "`seeds` must be an integer >= 2. Received: seeds=1"),
        ("--epochs", "0", "`epochs` must be an integer >= 1. Received: epochs=0"),
        ("--train-images", "1000", "Received: train_images=1000"),
        ("--epochs", "many", "Invalid value for '--epochs'"),
    ],
)
def test_bad_options(option: str, value: str, message: str, tmp_path: Path) -> None:
    result = _demo(option, value, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.only_torch
def test_help_names_the_options() -> None:
    result = _demo("--help")
    assert result.exit_code == 0
    for option in ("--data", "--seeds", "--train-images", "--epochs", "--output"):
        assert option in result.output


@pytest.mark.only_torch
@pytest.mark.parametrize(
    "module", ["typer", "sklearn.model_selection", "scipy.special"]
)
def test_a_missing_extra_is_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("", ".app", ".models", ".recipes"):
        monkeypatch.delitem(sys.modules, f"keras_nrs.commands{name}", raising=False)
    for name in ("demo", "demo_data"):
        monkeypatch.delitem(sys.modules, f"keras_nrs.experiments.{name}")
        monkeypatch.delattr(keras_nrs.experiments, name)
    monkeypatch.setattr(sys, "argv", ["keras-nrs", "demo", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert module in str(exit_info.value)
    assert 'pip install "keras-nrs[demo]"' in str(exit_info.value)


@pytest.mark.only_torch
def test_other_missing_modules_are_not_blamed_on_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'abc'", name="abc")

    monkeypatch.setattr(cli, "build_app", fail)
    with pytest.raises(ModuleNotFoundError, match="abc"):
        cli.main()


def _save(path: Path, **kwargs: Any) -> Path:
    model = cnn(**kwargs)
    x, y = image_data(32)
    model.fit(x, y, verbose=0)
    model.save(path)
    return path


def _flatness(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.build_app(), ["flatness", *map(str, arguments)])


@pytest.mark.matrix
def test_flatness_compares_saved_models(tmp_path: Path) -> None:
    first, second = (_save(tmp_path / f"{name}.keras") for name in ("one", "two"))
    x, y = image_data(40)
    data, output = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=x, y=y)
    options = ["--data", data, "--output", output, "--points", 3, "--k", 2]
    result = _flatness(first, second, *options)
    assert result.exit_code == 0, result.output
    model = keras.models.load_model(first)
    exact = keras_nrs.flatness.hessian_eigenvalues(model, x, y, k=2).eigenvalues
    shown = [float(word) for word in re.findall(r"\d+\.\d+", result.output)]
    for number in (*exact, model.evaluate(x, y, verbose=0)[0]):
        assert any(abs(number - other) < 0.006 * number for other in shown)
    for word in (
        "one",
        "two",
        "accuracy",
        "loss",
        "trace",
        "divergence, relative",
        "increase",
    ):
        assert word in result.output
    for name in ("landscape.png", "density.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<canvas") == 2
    assert "largest loss increase, eps 0.1" in page
    again = _flatness(first, second, *options)
    assert again.exit_code == 0
    assert "trace" in again.output


@pytest.mark.only_torch
def test_flatness_of_a_wrapped_model_on_digits(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((8, 8)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    compile_classifier(model)
    model.fit(np.ones((4, 8, 8)), np.zeros(4), verbose=0)
    keras_nrs.wrap(model).save(tmp_path / "wrapped.keras")
    path, output = tmp_path / "wrapped.keras", tmp_path / "out"
    options = ["--points", 2, "--batch-size", 1797, "--output", output]
    result = _flatness(path, "--data", "digits", *options)
    assert result.exit_code == 0, result.output
    assert "1797 samples" in result.output


# The model of docs/flatness.md, and the same with the scale of another data set.
@pytest.mark.only_torch
@pytest.mark.parametrize("scale", [1.0, 1 / 16])
def test_flatness_shows_the_accuracy_and_warns_of_chance(
    scale: float, tmp_path: Path
) -> None:
    images, y = load_digits()
    x = images.reshape(-1, 64)
    hidden = keras.layers.Dense(32, activation="relu")
    output_layer = keras.layers.Dense(10, kernel_regularizer=keras.regularizers.L2(0.1))
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Rescaling(scale), hidden, output_layer]
    )
    compile_classifier(model, optimizer="adam", metrics=[])
    model.fit(x[:200] / scale, y[:200], epochs=20, verbose=0)
    model.save(tmp_path / "model.keras")
    options = ["--points", 2, "--batch-size", 1797, "--output", tmp_path / "out"]
    result = _flatness(tmp_path / "model.keras", "--data", "digits", *options)
    assert result.exit_code == 0, result.output
    assert ("that of chance" in " ".join(result.output.split())) == (scale < 1)
    outputs = model.predict(x, verbose=0)
    accuracy = 100 * np.mean(np.argmax(outputs, axis=1) == y)
    assert f"{accuracy:.1f} %" in result.output
    assert f"{model.evaluate(x, y, verbose=0):.4g}" in result.output


@pytest.mark.only_torch
def test_bad_options_of_flatness(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.keras")
    for arguments, message in (
        ([path, "--data", "nothing.npz"], "`data` must be 'digits' or an .npz file"),
        ([path, "--data", "digits", "--k", "0"], "`k` must be an integer >= 1"),
        ([path, "--data", "digits", "--variables", "x"], "`variables` must be one of"),
        ([tmp_path / "no.keras", "--data", "digits"], "`models` must be files"),
    ):
        result = _flatness(*arguments, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def _train(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["train", *arguments])


@pytest.mark.only_torch
def test_train_runs_each_seed_and_repeats_none(tmp_path: Path) -> None:
    arguments = ["digits-wide_resnet_10_1-none-baseline", "--output", str(tmp_path)]
    changes = ("seeds=0,1", "epochs=1", "steps_per_epoch=2", "flatness=False")
    arguments += [part for change in changes for part in ("--set", change)]
    result = _train(*arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("test_accuracy") == 2
    folder = tmp_path / "digits-wide_resnet_10_1-none-baseline"
    written = {path.name for path in (folder / "seed-1").iterdir()}
    assert written == {
        "environment.json",
        "history.csv",
        "model.keras",
        "recipe.json",
        "summary.json",
        "tensorboard",
    }
    assert _train(*arguments).output.count("finished before") == 2
    other = _train(*arguments, "--set", "eps=0.3")
    assert other.exit_code == 2
    assert "eps=0.4 there, 0.3 here" in " ".join(other.output.split())


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10-resnet-basic-nrs"], "'. Similar names: cifar10-resnet18-basic-nrs"),
        (["?"], "No recipe has the name '?'. All names: keras-nrs train list"),
        (["cifar10-resnet18-basic-nrs", "--set", "epz=1"], "Similar keys: eps"),
        (["digits-wide_resnet_10_1-none-nrs", "--set", "batch_size=0"], "batch_size=0"),
    ],
)
def test_train_names_bad_arguments(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = _train(*arguments, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.only_torch
def test_train_lists_the_recipes() -> None:
    listed = _train("list").output.split()
    assert "cifar10-wide_resnet_28_10-cutout-nrs" in listed
    assert len(listed) == 111


TOO_LONG = "x" * 300


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("command", "output", "message"),
    [
        (["demo", "--data", "digits"], "a file/runs", "Not a directory"),
        (["demo", "--data", "digits"], TOO_LONG, "File name too long"),
        (["train", DIGITS], "a file", "Not a directory"),
        (["train", DIGITS], "a file/runs", "Not a directory"),
        (["train", DIGITS], TOO_LONG, "File name too long"),
        (["sweep", DIGITS, "--vary", "eps=0.1"], "a file", "Not a directory"),
        (["sweep", DIGITS, "--vary", "eps=0.1"], TOO_LONG, "File name too long"),
        (["report", "runs.csv"], "a file", "File exists"),
        (["report", "runs.csv"], "a file/report", "Not a directory"),
        (["report", "runs.csv"], TOO_LONG, "File name too long"),
        (["flatness", "model.keras", "--data", "digits"], "a file", "File exists"),
        (["flatness", "model.keras", "--data", "digits"], TOO_LONG, "too long"),
    ],
)
def test_errors_of_the_system_are_a_line_before_anything_is_trained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    output: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    Path("runs.csv").write_text(
        "dataset,network,augmentation,arm,seed,test_accuracy\nd,n,a,m,0,0.9\n"
    )
    if command[0] == "flatness":
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
        compile_classifier(model)
        model.optimizer.build(model.trainable_variables)
        model.save("model.keras")

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(keras.Model, "fit", fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(cli.build_app(), [*command, "--output", output])
    assert result.exit_code == 1, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.only_torch
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "device: 'a/b'"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only file system"),
        (RuntimeError("Can't write (No space left on device)"), 1, "No space left"),
        (InUseError("The folder is in use."), 1, "The folder is in use."),
        (DamagedFileError("a.json", "cut", "Delete it."), 1, "'a.json' is damaged: c"),
        (FloatingPointError("The loss is nan."), 1, "The loss is nan."),
        (KeyboardInterrupt(), 130, "Stopped. The same command goes on from here."),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(demo.Experiment, "run", fail)
    result = _demo("--output", str(tmp_path))
    assert result.exit_code == code
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.only_torch
def test_errors_of_this_program_have_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(demo.Experiment, "run", fail)
    result = _demo("--output", str(tmp_path))
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.only_torch
def test_damaged_measurements_name_themselves(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.keras")
    x, y = image_data(16)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    output = tmp_path / "out"
    arguments = [path, "--data", tmp_path / "data.npz", "--output", output]
    arguments += ["--points", 2]
    assert _flatness(*arguments).exit_code == 0
    (measured,) = output.glob("measured-*")
    for name, content in (
        ("measurements.json", b"{}"),
        ("measurements.json", b'{"loss": 1'),
        ("landscape.npz", (measured / "landscape.npz").read_bytes()[:-9]),
    ):
        whole = (measured / name).read_bytes()
        (measured / name).write_bytes(content)
        result = _flatness(*arguments)
        assert result.exit_code == 1, result.output
        assert f"{name}' is damaged" in result.stderr.splitlines()[-1]
        (measured / name).write_bytes(whole)
    assert _flatness(*arguments).exit_code == 0


@pytest.mark.only_torch
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_both_names_of_the_help(option: str) -> None:
    result = CliRunner().invoke(cli.build_app(), [option])
    assert result.exit_code == 0
    assert "--version" in result.output
    assert "Neighborhood Region Smoothing" in result.output
    assert "..." not in result.output.partition("Commands:")[2]


@pytest.mark.only_torch
def test_version() -> None:
    result = CliRunner().invoke(cli.build_app(), ["--version"])
    assert result.exit_code == 0
    assert result.output == f"keras-nrs {keras_nrs.__version__}\n"


@pytest.mark.only_torch
def test_names_of_recipes_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KERAS_NRS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "keras-nrs train digits-")
    monkeypatch.setenv("COMP_CWORD", "2")
    result = CliRunner().invoke(cli.build_app(), prog_name="keras-nrs")
    schemes = ("nrs", "rpr", "baseline")
    names = [f"digits-wide_resnet_10_1-none-{scheme}" for scheme in schemes]
    assert result.output.split() == names


@pytest.mark.only_torch
def test_train_list_has_a_filter() -> None:
    listed = _train("list", "cifar100", "cutout", "vgg").output.split()
    schemes = ("nrs", "rpr", "baseline")
    assert listed == [f"cifar100-vgg16-cutout-{scheme}" for scheme in schemes]
    result = _train("list", "mnist2")
    assert result.exit_code == 2
    assert "must be parts of the name of a recipe" in " ".join(result.output.split())
    result = _train(DIGITS, "eps=0.3")
    assert result.exit_code == 2
    assert "Change values of a recipe with --set" in " ".join(result.output.split())


@pytest.mark.only_torch
@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_dry_run_says_what_would_be_done_and_touches_nothing(
    name: str, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    arguments = [name, "cifar10-resnet18-basic-nrs", "--dry-run", "--set", "seeds=0,1"]
    arguments += ["--output", str(output), "--data-dir", str(data)]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    for text in (f"Data: {data}", str(output), "Dry run: nothing was read, trained"):
        assert text in result.output
    assert ("18 trainings" if name == "sweep" else "2, one for") in result.output
    assert not list(tmp_path.iterdir())


# Answered before TensorFlow Datasets is imported, or an address is tried.
@pytest.mark.only_torch
@pytest.mark.parametrize("name", ["train", "sweep"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augmentation=mixup", "`augmentation` must be one of"),
        ("validation_percent=95", "`validation_percent` must be an integer from 0"),
        ("label_smoothing=2", "`label_smoothing` must be >= 0 and < 1"),
        ("image_size=0", "`image_size` must be an integer >= 1"),
        ("scheme=sam", "`perturbation` must not be given with scheme='sam'"),
    ],
)
def test_bad_settings_are_named_before_data_are_touched(
    monkeypatch: pytest.MonkeyPatch, name: str, setting: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "keras_nrs.data", None)
    arguments = [name, "cifar10-resnet18-basic-nrs", "--set", setting]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


SCRIPT = """
import keras

def make_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model
"""


@pytest.mark.only_torch
def test_tune_trains_the_model_of_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    np.savez("data.npz", x=x, y=y)
    monkeypatch.setattr(settings, "DEFAULTS", {"NRS, by default": {}})

    def tune(script: str, *options: Any) -> Any:
        arguments = ["tune", script, "--data", "data.npz", *map(str, options)]
        return CliRunner().invoke(cli.build_app(), arguments)

    options = ["--epochs", 1, "--seeds", 2, "--validation-split", 0.5]
    result = tune("script.py:make_model", *options)
    assert result.exit_code == 0, result.output
    for text in (
        "judging seed 1, NRS, by default: accuracy",
        "Keep the baseline",
        "Written: ",
    ):
        assert text in result.output
    assert {path.name for path in Path("tune").iterdir()} >= {"best.keras", "runs.json"}
    again = tune("script.py:make_model", *options)
    assert again.output.count("finished before") == 6
    for script, changes, message in (
        ("script.py:make", [], "which is missing there"),
        ("script.py:make_model", ["--metric", "auc"], "`metric` must be 'auto'"),
        ("script.py:make_model", ["--batch-size", 7], "another call, whose fit differ"),
        ("script.py:make_model", ["--seeds", 1], "`seeds` must be an integer from 2"),
    ):
        bad = tune(script, *options, *changes)
        assert bad.exit_code == 2
        assert message in " ".join(bad.output.split())
