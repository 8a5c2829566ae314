"""Across modules: damaged files, edited files and a full disk."""

import errno
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_nrs
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.bad_input import linear
from tests.support.bad_input import row
from tests.support.bad_input import truncated


def edited(change: Callable[[dict[str, Any]], Any]) -> Any:
    """A model from a file whose configuration was changed."""
    keras_nrs.wrap(linear()).save("model.keras")
    with zipfile.ZipFile("model.keras") as file:
        members = {name: file.read(name) for name in file.namelist()}
    config = json.loads(members["config.json"])
    change(config["config"])
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile("edited.keras", "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return keras.saving.load_model("edited.keras", compile=False)


def load_truncated_weights() -> None:
    nrs = keras_nrs.wrap(linear())
    nrs.save_weights("of.weights.h5")
    nrs.load_weights(truncated("of.weights.h5"))


def load_truncated_model() -> None:
    keras_nrs.wrap(linear()).save("model.keras")
    keras.saving.load_model(truncated("model.keras"))


FILES = [
    row(
        "newer",
        ValueError,
        "`config` must be .*'future'",
        edited,
        lambda c: c.update(future=1),
    ),
    row(
        "no model",
        ValueError,
        "`config` must be .*'base_model'",
        edited,
        lambda c: c.pop("base_model"),
    ),
    row(
        "scheme",
        ValueError,
        "`scheme` must be",
        edited,
        lambda c: c.update(scheme="sharp"),
    ),
    row(
        "eps", TypeError, "`eps` must be a number", edited, lambda c: c.update(eps="a")
    ),
    row("truncated model", ValueError, "accessible `.keras` zip", load_truncated_model),
    row("truncated weights", OSError, "truncated file", load_truncated_weights),
    row(
        "ending",
        ValueError,
        "filepath=weights.keras",
        lambda: keras_nrs.wrap(linear()).save_weights("weights.keras"),
    ),
    row(
        "no ending",
        ValueError,
        "filepath=model",
        lambda: keras_nrs.wrap(linear()).save("model"),
    ),
    row("no path", TypeError, "PathLike", lambda: keras_nrs.wrap(linear()).save(None)),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("function", "error", "match"), FILES)
@pytest.mark.usefixtures("in_tmp_path")
def test_bad_input(
    function: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=re.compile(match, re.DOTALL)):
        function()


@pytest.mark.matrix
def test_a_file_of_an_older_version_has_the_defaults_of_new_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = ("memory_efficient", "perturbed_fraction", "divergence", "seed")
    loaded = edited(lambda config: [config.pop(name) for name in new])
    assert loaded.get_config()["divergence"] == "auto"
    assert (loaded.memory_efficient, loaded.perturbed_fraction) == (False, 1.0)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["nrs.keras", "nrs.weights.h5"])
def test_a_full_disk_leaves_the_old_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other."""
    path = tmp_path / name
    nrs = keras_nrs.wrap(linear())
    save = nrs.save if path.suffix == ".keras" else nrs.save_weights
    save(path)
    old = path.read_bytes()
    writes = []

    def full(self: Any, store: Any) -> None:
        writes.append(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras_nrs.NRSModel, "save_own_variables", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(path)
    assert writes
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_failed_load_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nrs = keras_nrs.wrap(linear())
    nrs.save_weights("of.weights.h5")
    nrs.eps = 0.7
    before = numpy_values(nrs.variables)
    with pytest.raises(OSError, match="truncated file"):
        nrs.load_weights(truncated("of.weights.h5"))
    assert_equal(numpy_values(nrs.variables), before)
    assert float(ops.convert_to_numpy(nrs.eps)) == np.float32(0.7)
