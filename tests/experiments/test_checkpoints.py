"""A training goes on from facts: what it does with damaged and strange files."""

import csv
import itertools
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError
from keras_nrs._locks import locked
from keras_nrs.experiments import recipes
from keras_nrs.experiments.training import Training
from tests.experiments.runs import digits_recipe
from tests.experiments.runs import linear_network

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

EPOCHS = 4


def training(folder: Path, data_dir: str, seed: int = 0) -> Training:
    recipe = digits_recipe(network="linear", epochs=EPOCHS, flatness=False)
    return Training(recipe, seed, folder, data_dir)


def run(folder: Path, data_dir: str, until: int | None = None) -> dict[str, Any]:
    return training(folder, data_dir).run(verbose=0, until=until)


def weights(folder: Path) -> list[np.ndarray]:
    model = keras.saving.load_model(folder / "model.keras")
    found: list[np.ndarray] = model.get_weights()
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: str) -> Path:
    """Folders of an undisturbed training, and of one that stopped after 3 epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(recipes.NETWORKS, "linear", linear_network)
        run(folder / "whole", data_dir)
        run(folder / "stopped", data_dir, until=3)
    return folder


@pytest.fixture
def whole(trained: Path, tmp_path: Path, linear: str) -> Path:
    return Path(shutil.copytree(trained / "whole", tmp_path / "whole"))


@pytest.fixture
def stopped(trained: Path, tmp_path: Path, linear: str) -> Path:
    return Path(shutil.copytree(trained / "stopped", tmp_path / "stopped"))


def check_same(stopped: Path, whole: Path) -> None:
    for a, b in zip(weights(stopped), weights(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows(stopped) == rows(whole)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (stopped, whole)]
    for name in ("epochs", "test_accuracy", "test_loss"):
        assert summaries[0][name] == summaries[1][name]


def strange(folder: Path) -> None:
    """Files that a user might put beside the checkpoints."""
    shutil.copy(folder / "checkpoint-3.keras", folder / "checkpoint-best.keras")
    shutil.copy(folder / "checkpoint-3.keras", folder / "checkpoint-99.keras")
    (folder / "checkpoint-0.keras").write_bytes(b"old")
    (folder / "checkpoint-.keras").write_bytes(b"")
    (folder / "checkpoint-1_0.keras").write_bytes(b"")


def dangling(folder: Path) -> None:
    (folder / "history.csv").unlink()
    (folder / "history.csv").symlink_to(folder / "nowhere")


def with_a_row_more(folder: Path) -> None:
    """As after a kill between the history and the checkpoint."""
    path = folder / "history.csv"
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + last.replace("2,", "3,", 1) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "history.csv").unlink(),
        dangling,
        with_a_row_more,
        strange,
    ],
    ids=["deleted history", "dangling history", "a row more", "strange files"],
)
def test_it_goes_on_to_the_same_weights(
    stopped: Path, whole: Path, data_dir: str, change: Callable[[Path], None]
) -> None:
    kept = sorted(path.name for path in stopped.glob("checkpoint*"))
    assert kept == ["checkpoint-2.keras", "checkpoint-3.keras"]
    change(stopped)
    run(stopped, data_dir)
    check_same(stopped, whole)
    left = {path.name for path in stopped.glob("checkpoint-[0-9].keras")}
    assert not left


@pytest.mark.parametrize("size", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_a_shortened_history_names_itself(
    stopped: Path, whole: Path, data_dir: str, size: int
) -> None:
    path = stopped / "history.csv"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedFileError, match=r"history.csv'.*3 epochs.*Delete it"):
        run(stopped, data_dir)
    path.unlink()
    run(stopped, data_dir)
    check_same(stopped, whole)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def of_another_epoch(path: Path) -> None:
    shutil.copy(path.with_name("checkpoint-2.keras"), path)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (cut, emptied)),
        of_another_epoch,
    ],
)
def test_a_damaged_checkpoint_costs_an_epoch(
    stopped: Path, whole: Path, data_dir: str, damage: Callable[[Path], None]
) -> None:
    damage(stopped / "checkpoint-3.keras")
    match = r"checkpoint-3.keras' is damaged.*Going on from checkpoint-2.keras"
    with pytest.warns(UserWarning, match=match):
        run(stopped, data_dir)
    check_same(stopped, whole)


def test_two_damaged_checkpoints_name_themselves(stopped: Path, data_dir: str) -> None:
    for epoch in (2, 3):
        cut(stopped / f"checkpoint-{epoch}.keras")
    with pytest.raises(DamagedFileError, match=r"checkpoint-3.keras'.*Delete it"):
        run(stopped, data_dir)


def test_a_checkpoint_of_another_seed(
    stopped: Path, data_dir: str, tmp_path: Path
) -> None:
    training(tmp_path / "other", data_dir, seed=1).run(verbose=0, until=3)
    for epoch in (2, 3):
        shutil.copy(tmp_path / "other" / f"checkpoint-{epoch}.keras", stopped)
    with pytest.raises(DamagedFileError, match="seed=1 there, 0 here"):
        run(stopped, data_dir)


def test_any_flipped_bit_changes_nothing_or_is_found(
    stopped: Path, data_dir: str
) -> None:
    """Through the whole file, at random places."""
    path = stopped / "checkpoint-3.keras"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    read = training(stopped, data_dir)._checkpoints._history_of
    expected, found = read(path, 3), 0
    places = *rng.integers(0, len(whole), 300), *range(len(whole) - 400, len(whole))
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            # Without its member it is one of 0.1.0, whose rows are in history.csv.
            assert read(path, 3) in (expected, None)
        except DamagedFileError:
            found += 1
            continue
        # What has no checksum is no content.
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
    assert found > 300


def test_a_checkpoint_of_version_0_1_0(
    stopped: Path, whole: Path, data_dir: str
) -> None:
    for path in stopped.glob("checkpoint-*.keras"):
        with zipfile.ZipFile(path) as file:
            members = {n: file.read(n) for n in file.namelist() if "nrs" not in n}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    history = stopped / "history.csv"
    text = history.read_text()
    history.write_text("\n".join(text.splitlines()[:2]))
    with pytest.raises(DamagedFileError, match=r"history.csv'.*rows of 3 epochs"):
        run(stopped, data_dir)
    history.unlink()
    with pytest.raises(DamagedFileError, match=r"history\.csv"):
        run(stopped, data_dir)
    history.write_text(text.replace("\n", "\r\n"), newline="")
    run(stopped, data_dir)
    check_same(stopped, whole)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.json", ""),
        ("recipe.json", "[]"),
        ("recipe.json", "{}"),
        ("recipe.json", '{"seeds": null, "scheme": "best"}'),
        ("environment.json", '{"a": 1}'),
        ("environment.json", "\x00"),
    ],
)
def test_a_damaged_file_names_itself(
    stopped: Path, data_dir: str, name: str, text: str
) -> None:
    (stopped / name).write_text(text)
    with pytest.raises(DamagedFileError, match=rf"{name}' is damaged"):
        run(stopped, data_dir)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"epochs": 1, "training_seconds": 1.0}', "\udcff"]
)
def test_a_damaged_summary_names_itself(whole: Path, data_dir: str, text: str) -> None:
    (whole / "summary.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedFileError, match=r"summary.json' is damaged"):
        run(whole, data_dir)


def test_a_summary_without_its_recipe(whole: Path, data_dir: str) -> None:
    (whole / "recipe.json").unlink()
    with pytest.raises(DamagedFileError, match=r"recipe.json'.*missing"):
        run(whole, data_dir)


def test_clocks_that_jump(
    stopped: Path, whole: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back by years and forth, as those of machines that wake up."""
    jumps = itertools.cycle([0.0, -1e9, 1e9, 3.0])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    summary = run(stopped, data_dir)
    check_same(stopped, whole)
    assert 0 < summary["training_seconds"] < 1e4


def test_a_training_has_one_writer(stopped: Path, data_dir: str) -> None:
    with locked(stopped), pytest.raises(InUseError, match="is in use by process"):
        run(stopped, data_dir)
    assert run(stopped, data_dir)["epochs"] == EPOCHS
    # A finished one can be read by all.
    with locked(stopped):
        assert run(stopped, data_dir)["epochs"] == EPOCHS


def test_a_training_that_lost_its_lock_writes_no_more(
    stopped: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keras_nrs._locks import Lock

    def lost(self: Lock) -> None:
        raise InUseError("taken over")

    before = {path.name: path.read_bytes() for path in stopped.glob("*.*")}
    monkeypatch.setattr(Lock, "check", lost)
    with pytest.raises(InUseError):
        run(stopped, data_dir)
    after = {path.name: path.read_bytes() for path in stopped.glob("*.*")}
    assert {n: before[n] for n in before if n != "environment.json"} == {
        n: after[n] for n in after if n != "environment.json"
    }
