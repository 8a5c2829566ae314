"""Searches that are killed, and KerasTuner's distributed mode."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from itertools import chain
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
from tests.support.processes import NUMBERS
from tests.support.processes import free_ports

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


# A chief or a worker. Its trainings wait until all workers train. A worker that is
# killed in its first one is started again.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from keras_tuner.src.distribute import oracle_chief
from keras_nrs import cli
from keras_nrs.experiments import paper_sweeps, search, sweep

class Training:
    def __init__(self, recipe, seed, path, data_dir, test):
        self.recipe, self.name = recipe, path.parent.name

    def run(self, verbose, until, callbacks):
        worker = folder / os.environ["KERASTUNER_TUNER_ID"]
        worker.with_suffix(".started").touch()
        while len(list(folder.glob("*.started"))) < number:
            time.sleep(0.05)
        if is_deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        with worker.with_suffix(".log").open("a") as file:
            file.write(self.name + "\\n")
        return {"validation_accuracy": self.recipe.eps, "training_seconds": 0}

sweep.Training = Training
# The chief waits for 20 seconds after the first worker has left.
oracle_chief.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.2))

def main(name, num_workers, victim, *arguments):
    global folder, number, is_deadly
    folder, number, sys.argv[1:] = Path(name), num_workers, arguments
    is_deadly = os.environ["KERASTUNER_TUNER_ID"] == victim
    if is_deadly and (first := os.fork()):
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == -signal.SIGKILL
        is_deadly = False
    cli.main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    with Script(SCRIPT, tmp_path_factory.mktemp("outputs")) as script:
        yield script


def environments(*names: str) -> list[dict[str, str]]:
    """What makes a process the chief or a worker."""
    address = {"IP": "127.0.0.1", "PORT": str(*free_ports(1))}
    common = {f"KERASTUNER_ORACLE_{key}": address[key] for key in address}
    return [common | {"KERASTUNER_TUNER_ID": name} for name in names]


@pytest.mark.parametrize("number", NUMBERS)
def test_workers_share_a_search_and_one_is_killed(
    tmp_path: Path, script: Script, number: int
) -> None:
    names = [f"worker-{i}" for i in range(number)]
    options = ["sweep", NRS, "--set", "seeds=0", "--output", str(tmp_path / "out")]
    options += ["--vary", "eps=0.1,0.2,0.3", "--vary", "alpha=1,2"]

    def run(*names: str) -> list[tuple[int, str]]:
        arguments = [str(tmp_path), number, "worker-1", *options]
        return script.run_together(*((arguments, e) for e in environments(*names)))

    results = run("chief", *names)
    assert [code for code, _ in results] == [0] * (1 + number), results
    done = [(tmp_path / f"{name}.log").read_text().split() for name in names]
    assert all(done)
    grid = [f"eps={eps},alpha={alpha}" for eps in (0.1, 0.2, 0.3) for alpha in (1, 2)]
    assert sorted(chain(*done)) == grid
    chief, *workers = [output for _, output in results]
    assert "Best: eps=0.3" in chief
    assert not any("Best" in output for output in workers)
    assert sum(output.count("validation accuracy 0.") for output in workers) == 6
    best = json.loads((tmp_path / "out" / NRS / "best.json").read_text())
    assert best["validation_accuracy"] == 0.3
    # What comes too late waits for no one.
    for name in ("worker-0", "chief"):
        ((code, output),) = run(name)
        assert code == 0 and "has finished before" in output, output
    assert done == [(tmp_path / f"{name}.log").read_text().split() for name in names]


def test_a_worker_says_what_stopped_its_chief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RpcError(Exception):
        def details(self) -> str:
            return "[Errno 28] No space left on device"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RpcError

    (environment,) = environments("worker-1")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(search.BaseTuner, "search", fail)
    with pytest.raises(
        OSError, match=r"chief at 127\.0\.0\.1:\d+ could not.*No space left"
    ):
        make("grid", tmp_path).run(lambda line: None)


@pytest.mark.parametrize("name", SEARCHES)
def test_one_process_goes_on_where_workers_were_stopped(
    tmp_path: Path, trained: list[Any], kill_at: Any, name: str
) -> None:
    kill_at(2, True)
    with pytest.raises(Killed):
        make(name, tmp_path / "stopped").run(lambda line: None)
    path = tmp_path / "stopped" / "search.json"
    state = json.loads(path.read_text())
    ongoing = state["oracle"]["ongoing_trials"]
    ongoing["worker-1"] = ongoing.pop("tuner0")
    path.write_text(json.dumps(state))
    kill_at(0, True)
    for folder in ("stopped", "whole"):
        make(name, tmp_path / folder).run(lambda line: None)
    found = [trials_in_order(tmp_path / folder) for folder in ("stopped", "whole")]
    assert found[0] == found[1]


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
