"""The store of finished runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError
from keras_nrs._run_store import RunStore

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


KEY = ("arm", "seed")


def store_of(path: Path, **settings: Any) -> RunStore:
    return RunStore(path / "runs.json", KEY, settings)


def test_a_run_is_done_once(tmp_path: Path) -> None:
    runs = iter([{"loss": 0.5}, {"loss": 0.25}])
    for _ in range(2):
        store = store_of(tmp_path / "new", epochs=3)
        for seed, loss in ((0, 0.5), (1, 0.25)):
            found = store.get({"arm": "NRS", "seed": seed}, lambda: next(runs))
            assert found == {"arm": "NRS", "seed": seed, "loss": loss}
    content = json.loads((tmp_path / "new" / "runs.json").read_text())
    assert content == {"settings": {"epochs": 3}, "runs": store.rows}


def test_a_failed_run_is_not_stored(tmp_path: Path) -> None:
    def fail() -> Any:
        raise KeyboardInterrupt

    store = store_of(tmp_path)
    store.get({"arm": "NRS", "seed": 0}, dict)
    with pytest.raises(KeyboardInterrupt):
        store.get({"arm": "NRS", "seed": 1}, fail)
    assert store_of(tmp_path).rows == [{"arm": "NRS", "seed": 0}]


def test_files_with_other_settings_are_kept(tmp_path: Path) -> None:
    for epochs in (1, 2, 3):
        store = store_of(tmp_path, epochs=epochs)
        assert store.rows == []
        store.get({"arm": "NRS", "seed": epochs}, dict)
    for name, epochs in (("runs.1.json", 1), ("runs.2.json", 2), ("runs.json", 3)):
        content = json.loads((tmp_path / name).read_text())
        assert content["settings"] == {"epochs": epochs}
        assert content["runs"] == [{"arm": "NRS", "seed": epochs}]


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"runs": [{"arm": "x"}]}'])
def test_files_of_another_format_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"runs\.json' is damaged"):
        store_of(tmp_path)


def test_a_run_that_is_there_twice(tmp_path: Path) -> None:
    rows = [{"arm": "NRS", "seed": seed} for seed in (0, 1, 0)]
    content = {"settings": {"epochs": 3}, "runs": rows}
    (tmp_path / "runs.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"the run arm='NRS', seed=0 twice"):
        store_of(tmp_path, epochs=3)


def test_one_process_adds_runs(tmp_path: Path) -> None:
    first, second = store_of(tmp_path), store_of(tmp_path)
    with first.locked():
        first.get({"arm": "NRS", "seed": 0}, dict)
        with pytest.raises(InUseError, match="is in use by"), second.locked():
            pass
    # It has read the file before the first one wrote to it.
    assert second.rows == []
    with second.locked():
        assert second.rows == first.rows
        second.get({"arm": "NRS", "seed": 1}, dict)
    assert len(store_of(tmp_path).rows) == 2


def test_other_settings_may_be_an_error_that_names_them(tmp_path: Path) -> None:
    settings = {"epochs": 1, "data": "a", "model": "m"}
    store_of(tmp_path, **settings).get({"arm": "NRS", "seed": 0}, dict)
    path, before = tmp_path / "runs.json", (tmp_path / "runs.json").read_text()
    with pytest.raises(ValueError, match="another call, whose epochs and data differ"):
        RunStore(path, KEY, settings | {"epochs": 2, "data": "b"}, renames=False)
    assert path.read_text() == before
    assert len(RunStore(path, KEY, settings, renames=False).rows) == 1
