"""The command `keras-nrs`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import keras_nrs.experiments
from keras_nrs import cli
from keras_nrs.experiments import demo


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
    return CliRunner().invoke(cli.build_app(), ["demo", *arguments])


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
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "demo.png",
        "runs.json",
    }
    again = _demo(*options, "--output", str(tmp_path / "new"))
    assert len(no_training) == 10
    assert "10 runs are in" in again.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "1", "`seeds` must be an integer >= 2. Received: seeds=1"),
        ("--epochs", "0", "`epochs` must be an integer >= 1. Received: epochs=0"),
        ("--train-images", "1000", "Received: train_images=1000"),
        ("--epochs", "many", "valid integer"),
    ],
)
def test_bad_options(option: str, value: str, message: str, tmp_path: Path) -> None:
    result = _demo(option, value, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_help_names_the_options() -> None:
    result = _demo("--help")
    assert result.exit_code == 0
    for option in ("--seeds", "--train-images", "--epochs", "--output"):
        assert option in result.output


@pytest.mark.parametrize("module", ["typer", "sklearn.datasets", "scipy.sparse.linalg"])
def test_a_missing_extra_is_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, demo.__name__)
    monkeypatch.delattr(keras_nrs.experiments, "demo")
    monkeypatch.setattr(sys, "argv", ["keras-nrs", "demo", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert module in str(exit_info.value)
    assert 'pip install "keras-nrs[demo]"' in str(exit_info.value)


def test_other_missing_modules_are_not_blamed_on_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'abc'", name="abc")

    monkeypatch.setattr(cli, "build_app", fail)
    with pytest.raises(ModuleNotFoundError, match="abc"):
        cli.main()


# JAX itself needs scipy, and one backend is enough.
@pytest.mark.only_torch
def test_importing_the_package_and_the_command_needs_no_extra() -> None:
    code = (
        "import keras, sys\n"
        "for name in ('typer', 'sklearn', 'scipy', 'matplotlib'):\n"
        "    sys.modules.setdefault(name, None)\n"
        "import keras_nrs, keras_nrs.cli, keras_nrs.experiments"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
