"""Searches that are killed, and KerasTuner's distributed mode."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keras_nrs._files import DamagedFileError
from keras_nrs.experiments import search
from tests.experiments.processes import Script
from tests.experiments.runs import NRS
from tests.experiments.sweeps import SEARCHES
from tests.experiments.sweeps import invoke
from tests.experiments.sweeps import make
from tests.experiments.sweeps import trials_in_order

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Stops the program at the n-th write of the state, before or after it."""
    write_text = search.write_text

    def set_kill(write: int, before: bool) -> None:
        writes = iter(range(1, 1000))

        def write_and_die(*args: Any) -> None:
            is_last = next(writes) == write
            if is_last and before:
                raise Killed
            write_text(*args)
            if is_last:
                raise Killed

        monkeypatch.setattr(search, "write_text", write_and_die)

    return set_kill


def run_with_kills(
    name: str, folder: Path, kill_at: Callable[[int, bool], None]
) -> int:
    """Each process makes one write, and dies just after it or before the next one."""
    for kills in range(1000):
        kill_at(1 + kills % 2, kills % 2 == 1)
        try:
            make(name, folder).run(lambda line: None)
        except Killed:
            continue
        return kills
    raise AssertionError


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_killed_at_every_write_is_the_undisturbed_one(
    tmp_path: Path, trained: list[Any], kill_at: Any, name: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_at(0, False)
    make(name, whole).run(lambda line: None)
    undisturbed = trained.copy()
    trained.clear()
    kills = run_with_kills(name, killed, kill_at)
    assert trials_in_order(killed) == trials_in_order(whole)
    assert trained == undisturbed
    assert kills >= 2 * len(trials_in_order(whole)) - 1
    for file in ("trials.csv", "best.json"):
        assert (killed / file).read_text() == (whole / file).read_text()


# The Bayesian search takes seconds for a trial.
@pytest.mark.parametrize("name", ["grid", "random", "hyperband"])
def test_a_search_killed_once_is_the_undisturbed_one(
    tmp_path: Path, trained: list[Any], kill_at: Any, name: str
) -> None:
    kill_at(0, False)
    make(name, tmp_path / "whole").run(lambda line: None)
    undisturbed = trained.copy()
    expected = trials_in_order(tmp_path / "whole")
    for write in range(1, 2 * len(expected) + 1, 1 if name == "grid" else 5):
        for before in (True, False):
            trained.clear()
            folder = tmp_path / f"{write}-{before}"
            kill_at(write, before)
            with pytest.raises(Killed):
                make(name, folder).run(lambda line: None)
            make(name, folder).run(lambda line: None)
            assert trials_in_order(folder) == expected
            assert trained == undisturbed


@pytest.mark.parametrize("vary", [[], ["--vary", "eps=0.1,0.2"]])
def test_distributed_mode_needs_all_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vary: list[str]
) -> None:
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    result = invoke(NRS, *vary, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "Set KERASTUNER_ORACLE_PORT and KERASTUNER_TUNER_ID" in " ".join(
        result.output.split()
    )


# A chief or a worker. Its trainings wait until both workers train.
SCRIPT = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from keras_tuner.src.distribute import oracle_chief
from keras_nrs import cli
from keras_nrs.experiments import paper_sweeps, sweep

class Training:
    def __init__(self, recipe, seed, path, data_dir, test):
        self.recipe, self.name = recipe, path.parent.name

    def run(self, verbose, until, callbacks):
        log = folder / f"{os.environ['KERASTUNER_TUNER_ID']}.log"
        with log.open("a") as file:
            file.write(self.name + "\\n")
        while len(list(folder.glob("*.log"))) < 2:
            time.sleep(0.05)
        return {"validation_accuracy": self.recipe.eps, "training_seconds": 0}

sweep.Training = Training
# The chief waits for 20 seconds after the first worker has left.
oracle_chief.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.2))

def main(name, *arguments):
    global folder
    folder, sys.argv[1:] = Path(name), arguments
    cli.main()
"""


def test_two_workers_share_a_search(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [
        str(tmp_path),
        *["sweep", NRS, "--set", "seeds=0", "--output", str(tmp_path / "out")],
        *["--vary", "eps=0.1,0.2,0.3", "--vary", "alpha=1,2"],
    ]
    address = {"IP": "127.0.0.1", "PORT": str(port)}
    environment = {f"KERASTUNER_ORACLE_{key}": address[key] for key in address}
    with Script(SCRIPT, tmp_path) as script:
        results = script.run_together(
            *(
                (arguments, environment | {"KERASTUNER_TUNER_ID": name})
                for name in ("chief", "one", "two")
            )
        )
    assert [code for code, _ in results] == [0, 0, 0], results
    done = [(tmp_path / f"{name}.log").read_text().split() for name in ("one", "two")]
    assert all(done)
    grid = [f"eps={eps},alpha={alpha}" for eps in (0.1, 0.2, 0.3) for alpha in (1, 2)]
    assert sorted(done[0] + done[1]) == grid
    chief, *workers = [output for _, output in results]
    assert "Best: eps=0.3" in chief
    assert not any("Best" in output for output in workers)
    assert sum(output.count("validation accuracy 0.") for output in workers) == 6
    best = json.loads((tmp_path / "out" / NRS / "best.json").read_text())
    assert best["validation_accuracy"] == 0.3


DAMAGE = {
    "empty": "",
    "no object": "[]",
    "no oracle": '{"request": {}}',
    "no trials": '{"request": {}, "oracle": {}}',
    "a trial of null": '{"request": {}, "oracle": {"trials": [null]}}',
    "a trial of nothing": '{"request": {}, "oracle": {"trials": [{}]}}',
    "trials alone": '{"request": {}, "oracle": {"trials": []}}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_names_itself(
    tmp_path: Path, trained: list[Any], name: str
) -> None:
    (tmp_path / "search.json").write_text(DAMAGE[name])
    with pytest.raises(DamagedFileError, match=r"search\.json' is damaged.*Restore it"):
        make("grid", tmp_path).run(lambda line: None)
    assert trained == []


def test_trials_without_their_results_name_the_file(
    tmp_path: Path, trained: list[Any]
) -> None:
    make("grid", tmp_path).run(lambda line: None)
    path = tmp_path / "search.json"
    whole = json.loads(path.read_text())
    for key, value in (("metrics", {"metrics": {}}), ("hyperparameters", {})):
        state = json.loads(json.dumps(whole))
        state["oracle"]["trials"][0][key] = value
        path.write_text(json.dumps(state))
        with pytest.raises(DamagedFileError, match=r"search\.json' is damaged"):
            _ = make("grid", tmp_path).results


def test_a_cut_state_names_itself(tmp_path: Path, trained: list[Any]) -> None:
    make("grid", tmp_path).run(lambda line: None)
    path = tmp_path / "search.json"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedFileError, match=r"search\.json' is damaged"):
            make("grid", tmp_path)
