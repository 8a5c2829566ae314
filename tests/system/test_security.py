"""Across modules: files and arguments of others run nothing and write nothing."""

import importlib
import io
import json
import pickle
import stat
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import keras_nrs
from keras_nrs import cli
from keras_nrs import flatness
from keras_nrs.experiments import recipes
from tests.support.asserts import assert_equal
from tests.support.data import image_data
from tests.support.networks import cnn
from tests.support.processes import ROOT

# Nothing here depends on the backend, of which this one starts soonest.
pytestmark = pytest.mark.only_torch

X, Y = image_data(16)
RECIPE = "digits-wide_resnet_10_1-none-nrs"
STRANGE = "a folder [of] 'ä 雪' & $HOME; echo"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def saved(path: Path, **options: Any) -> Path:
    keras_nrs.wrap(cnn(), eps=0.3, perturbation="relative", **options).save(path)
    return path


def with_config(path: Path, change: Any) -> Path:
    """The same file with another config."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    config = json.loads(members["config.json"])
    change(config["config"])
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_a_lambda_in_the_base_model_is_not_run(tmp_path: Path) -> None:
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Lambda(lambda x: x), keras.layers.Dense(3)]
    )
    keras_nrs.wrap(model).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("member", ["perturbation", "divergence", "base_model"])
@pytest.mark.parametrize("target", ["os.system", "subprocess.call"])
def test_a_config_cannot_name_what_is_no_keras_object(
    tmp_path: Path, member: str, target: str
) -> None:
    pwned = tmp_path / "pwned"
    arguments = {
        "os.system": {"command": f"touch {pwned}"},
        "subprocess.call": {"args": ["touch", str(pwned)]},
    }[target]
    module, name = target.split(".")
    # They would do it.
    getattr(importlib.import_module(module), name)(**arguments)
    pwned.unlink()
    call = {"module": module, "class_name": name, "registered_name": name}
    path = with_config(
        saved(tmp_path / "model.keras"),
        lambda config: config.update({member: call | {"config": arguments}}),
    )
    with pytest.raises((TypeError, ValueError), match=f"{name}|instantiated|locate"):
        keras.saving.load_model(path)
    assert not pwned.exists()


@pytest.mark.parametrize("of", ["checkpoint", "landscape"])
def test_a_pickle_is_not_unpickled(tmp_path: Path, of: str) -> None:
    pwned, path = tmp_path / "pwned", tmp_path / "file.npz"
    losses = np.array([Payload(pwned)], dtype=object)
    np.savez(path, losses=losses, coordinates_0=np.zeros(1))
    with pytest.raises(ValueError, match="is damaged"):
        if of == "landscape":
            flatness.Landscape.load(path)
        else:
            flatness.loss_landscape(
                cnn(), X, Y, directions=1, num_points=3, checkpoint=path
            )
    assert not pwned.exists()
    pickle.loads(pickle.dumps(Payload(pwned)))
    assert pwned.exists()


def with_members(path: Path, members: dict[str, bytes], *, symlinks: Any = ()) -> Path:
    """The same file with more members, compressed."""
    with zipfile.ZipFile(path) as file:
        kept = {n: file.read(n) for n in file.namelist() if n not in members}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (kept | members).items():
            file.writestr(name, content)
        for name, target in symlinks:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, target)
    return path


def test_members_of_a_file_are_written_nowhere(tmp_path: Path) -> None:
    """With names that lead elsewhere, and links."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = with_members(
        saved(folder / "model.keras"),
        {
            "../pwned": b"1",
            f"{tmp_path}/pwned": b"2",
            "assets/../../../pwned": b"3",
            "assets/link/pwned": b"4",
        },
        symlinks=[("assets/link", str(tmp_path))],
    )
    with (
        pytest.warns(UserWarning, match="Skipping invalid path"),
        suppress(ValueError, OSError),
    ):
        keras.saving.load_model(path)
    assert {p.name for p in tmp_path.rglob("*")} == {"a", "b", "model.keras"}


def shape_bomb() -> bytes:
    """Weights that declare terabytes, and hold nothing."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        group = file.create_group("base_model/layers/dense/vars")
        group.create_dataset("0", (10**6, 10**6), "f4", chunks=(1000, 1000))
    return content.getvalue()


BOMBS: dict[str, Callable[[], dict[str, bytes]]] = {
    "config": lambda: {"config.json": b" " * 2**27},
    "weights": lambda: {"model.weights.h5": b"\0" * 2**27},
    "shapes": lambda: {"model.weights.h5": shape_bomb()},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    """By the command, which loads files of others."""
    path = with_members(saved(tmp_path / "model.keras"), BOMBS[name]())
    assert path.stat().st_size < 2**20
    arguments = ["flatness", str(path), "--data", "digits"]
    result = CliRunner().invoke(
        cli.build_app(), [*arguments, "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 2, (result.output, result.exception)
    assert "`models` must be files" in result.output
    assert not (tmp_path / "out").exists()


TEXTS = [
    "__import__('os').system('touch pwned')",
    "(lambda: 1)()",
    "{open('pwned', 'w')}",
    "$(touch pwned)",
    "`touch pwned`",
    "(" * 10_000,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_command_evaluates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ["train", RECIPE, "--set", f"eps={text}"],
        ["train", RECIPE, "--set", f"dataset={text}"],
        ["train", text],
        ["sweep", RECIPE, "--vary", f"eps={text}"],
        ["sweep", RECIPE, "--vary", f"eps={text}:1:log"],
        ["sweep", RECIPE, "--vary", f"alpha=1,{text}", "--search", text],
        ["report", text],
        ["flatness", text, "--data", text],
    ):
        result = CliRunner().invoke(cli.build_app(), command)
        # 1 for a path that is too long for the system.
        codes = (1, 2) if command[0] in ("report", "flatness") else (2,)
        assert result.exit_code in codes, (command, result.output, result.exception)
    assert recipes.literal(text) == text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["../../elsewhere", "/elsewhere"])
@pytest.mark.parametrize(
    "key", ["network", "augmentation", "perturbation", "optimizer", "dataset", "scheme"]
)
def test_values_of_settings_make_no_paths(tmp_path: Path, key: str, value: str) -> None:
    output = tmp_path / "a" / "b" / "runs"
    for arguments in (
        ["train", RECIPE, "--set", f"{key}={value}"],
        ["sweep", RECIPE, "--vary", f"{key}={value}"],
    ):
        arguments += ["--output", str(output), "--data-dir", str(tmp_path / "data")]
        result = CliRunner().invoke(cli.build_app(), arguments)
        assert result.exit_code == 2, (arguments, result.output, result.exception)
    # A known data set may have been prepared where it belongs.
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}


def test_strange_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces, other letters, what a shell or a pattern would read, and `..`."""
    folder = tmp_path / STRANGE
    folder.mkdir()
    monkeypatch.chdir(folder)
    nrs = keras_nrs.wrap(cnn(), eps=0.3, perturbation="relative")
    backup = keras.callbacks.BackupAndRestore(
        Path("..") / STRANGE / "back [u] p", delete_checkpoint=False
    )
    best = keras.callbacks.ModelCheckpoint(Path("..") / STRANGE / "{epoch} bäst.keras")
    nrs.fit(X, Y, verbose=0, callbacks=[backup, best])
    nrs.save(Path("new folder") / ".." / "ü 雪.keras")
    landscape = flatness.loss_landscape(
        nrs, X, Y, directions=1, num_points=3, checkpoint="point [s].npz"
    )
    landscape.save("länd [scape].npz")
    landscape.plot("länd [scape].png")
    flatness.hessian_eigenvalues(nrs, X, Y, checkpoint="prödukte [1]")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "back [u] p",
        "1 bäst.keras",
        "new folder",
        "ü 雪.keras",
        "point [s].npz",
        "länd [scape].npz",
        "länd [scape].png",
        "prödukte [1]",
    }
    assert {path.name for path in tmp_path.iterdir()} == {STRANGE}
    loaded = keras.saving.load_model("ü 雪.keras")
    assert_equal(loaded.get_weights(), nrs.get_weights())


def test_a_backup_names_no_file_elsewhere(tmp_path: Path) -> None:
    nrs = keras_nrs.wrap(cnn(), eps=0.3, perturbation="relative")
    folder = tmp_path / "backup"
    folder.mkdir()
    nrs.save_weights(tmp_path / "elsewhere.weights.h5")
    named = {"epoch": 1, "batch": 0, "weights": "../elsewhere.weights.h5"}
    (folder / "keras_nrs.json").write_text(json.dumps([named]))
    with pytest.raises(ValueError, match="elsewhere"):
        nrs.fit(X, Y, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(folder)])


def test_all_dependencies_have_a_lower_bound() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    for requirement in chain(project["dependencies"], *extras):
        assert ">=" in requirement or requirement.startswith("keras-nrs["), requirement
