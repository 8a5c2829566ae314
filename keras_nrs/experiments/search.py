"""KerasTuner's searches, with a state that no kill can tear.

KerasTuner 1.4 writes the state of its oracle and of each trial to files of their own,
one after the other and in place. It leaves out of them the order of a grid and the
random state of the Bayesian search, and writes that a trial has ended while it still
counts as running. Here one file holds everything. It is written as a whole, and after
each change alone: what a process did since then, the next one does again.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner import oracles
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.errors import FailedTrialError
from keras_tuner.errors import FatalError

from keras_nrs._files import write_text

OBJECTIVE = "validation_accuracy"
_POLLING_SECONDS = 0.2

State = dict[str, Any]


def role() -> str:
    """`"alone"`, or what this process is in KerasTuner's distributed mode.

    Returns:
        `"alone"`, `"chief"` or `"worker"`.

    Raises:
        ValueError: if only some of KerasTuner's variables are set.
    """
    names = ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID")
    if names[0] not in os.environ:
        return "alone"
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"KerasTuner's distributed mode needs the variables {', '.join(names)}. "
            f"Set {' and '.join(missing)} as well, or unset {names[0]}."
        )
    return "chief" if "chief" in os.environ[names[2]] else "worker"


class _WholeOracle(keras_tuner.Oracle):  # type: ignore[misc]
    """An oracle whose state is one file.

    Args:
        path: Of the file.
        request: What the file says about the search besides.
        settings: Of the oracle.
    """

    def __init__(self, *, path: Path, request: State, **settings: Any) -> None:
        super().__init__(**settings)
        self.path, self._request = path, request

    def create_trial(self, tuner_id: str) -> Trial:
        is_known = tuner_id in self.ongoing_trials
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.RUNNING and not is_known:
            self._write()
        return trial

    def end_trial(self, trial: Trial) -> None:
        # What came over the network has the values in another order.
        trial.hyperparameters = self.trials[trial.trial_id].hyperparameters
        super().end_trial(trial)
        self._write()

    def get_state(self) -> State:
        trials = [trial.get_state() for trial in self.trials.values()]
        return super().get_state() | {"trials": trials}

    def set_state(self, state: State) -> None:
        trials = [Trial.from_state(trial) for trial in state["trials"]]
        self.trials = {trial.trial_id: trial for trial in trials}
        # Under the name of the process that ran it, which gets it again.
        super().set_state(state)

    def reload(self) -> None:
        self.set_state(read_state(self.path)["oracle"])

    def save(self) -> None:
        """Nothing: KerasTuner calls it amid its changes."""

    def _save_trial(self, trial: Trial) -> None:
        """Nothing: trials are part of the state."""

    def _write(self) -> None:
        state = {"request": self._request, "oracle": self.get_state()}
        write_text(self.path, json.dumps(state) + "\n")


class _Grid(_WholeOracle, oracles.GridSearchOracle):  # type: ignore[misc]
    def get_state(self) -> State:
        ids = self.start_order[:1]
        while ids and (following := self._ordered_ids.next(ids[-1])) is not None:
            ids.append(following)
        grid = {"ordered_ids": ids, "populate_next": self._populate_next}
        return super().get_state() | grid

    def set_state(self, state: State) -> None:
        super().set_state(state)
        for trial_id in state["ordered_ids"]:
            self._ordered_ids.insert(trial_id)
        self._populate_next = state["populate_next"]


class _Random(_WholeOracle, oracles.RandomSearchOracle):  # type: ignore[misc]
    pass


class _Bayesian(_WholeOracle, oracles.BayesianOptimizationOracle):  # type: ignore[misc]
    def populate_space(self, trial_id: str) -> State:
        # A state that depends on what is in the file alone.
        self._random_state.seed(self.seed + len(self.trials))
        proposed: State = super().populate_space(trial_id)
        running = [t.hyperparameters.values for t in self.ongoing_trials.values()]
        if proposed["values"] in running:
            # Once that has ended, its result is there to be read.
            return {"status": TrialStatus.IDLE, "values": None}
        return proposed


class _Hyperband(_WholeOracle, oracles.HyperbandOracle):  # type: ignore[misc]
    pass


SEARCHES: dict[str, Callable[..., _WholeOracle]] = {
    "grid": _Grid,
    "random": _Random,
    "bayesian": _Bayesian,
    "hyperband": _Hyperband,
}


def read_state(path: Path) -> State:
    """The request and the oracle's state of a file, of which there may be none yet."""
    if not path.exists():
        return {"request": {}, "oracle": {"trials": []}}
    state: State = json.loads(path.read_text(encoding="utf-8"))
    return state


class Tuner(BaseTuner):  # type: ignore[misc]
    """Runs the trials of a search.

    Args:
        search: One of `SEARCHES`.
        train: Takes a trial and returns its metrics, the objective among them. A
            `FloatingPointError` is a result, too; other errors end the search.
        path: File of the state, with which an earlier search goes on.
        request: What the file says about the search besides.
        settings: Of KerasTuner's oracle.
    """

    def __init__(
        self,
        search: str,
        train: Callable[[Trial], dict[str, float]],
        *,
        path: Path,
        request: State,
        **settings: Any,
    ) -> None:
        oracle = SEARCHES[search](
            path=path,
            request=request,
            objective=keras_tuner.Objective(OBJECTIVE, "max"),
            max_consecutive_failed_trials=None,  # Equal to no number of them.
            **settings,
        )
        self._train, self._is_worker_process = train, role() == "worker"
        if path.exists() and not self._is_worker_process:
            oracle.reload()
        folder = path.parent
        super().__init__(oracle, directory=folder.parent, project_name=folder.name)

    def search(self) -> None:
        """Run what is left of the search, or serve it to the workers.

        Raises:
            Exception: that of a training which is not a `FloatingPointError`.
        """
        try:
            super().search(verbose=0)
        except FatalError as error:
            raise error.__cause__ or error from None

    def run_trial(self, trial: Trial, verbose: int) -> dict[str, float]:
        try:
            return self._train(trial)
        except FloatingPointError as error:
            raise FailedTrialError(str(error)) from error
        except Exception as error:
            raise FatalError(str(error)) from error

    def pre_create_trial(self) -> None:
        if self._is_worker_process:
            # While others' trials must end first, KerasTuner asks without a pause.
            time.sleep(_POLLING_SECONDS)

    def save(self) -> None:
        """Nothing: the oracle writes its state by itself."""

    def reload(self) -> None:
        """Nothing: the oracle has read its state."""
