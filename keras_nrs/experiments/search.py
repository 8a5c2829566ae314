"""KerasTuner's searches, with a state that stays consistent when a process is killed.

KerasTuner 1.4 writes the states of its oracle and of each trial to separate files, in
place. It leaves out the order of a grid and the random state of the Bayesian search,
and marks a trial as ended while it still counts as running. Here one file holds the
whole state, and is replaced atomically after each change. A process that goes on
repeats what an earlier one did after the last change.
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

from keras_nrs._files import DamagedFileError
from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text

OBJECTIVE = "validation_accuracy"
REMEDY = "Restore it, or choose another output folder."
_POLLING_SECONDS = 0.2
# Of KerasTuner's distributed mode.
_VARIABLES = ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID")

State = dict[str, Any]


def role() -> str:
    """The role of this process in KerasTuner's distributed mode.

    Returns:
        `"chief"` or `"worker"`, or `"alone"` outside the distributed mode.

    Raises:
        ValueError: if only some of KerasTuner's variables are set.
    """
    names = _VARIABLES
    if names[0] not in os.environ:
        return "alone"
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"KerasTuner's distributed mode needs the variables {', '.join(names)}. "
            f"Set {' and '.join(missing)} as well, or unset {names[0]}."
        )
    return "chief" if "chief" in os.environ[names[2]] else "worker"


class _AtomicOracle(keras_tuner.Oracle):  # type: ignore[misc]
    """An oracle that keeps its state in one file, written atomically."""

    def __init__(self, *, path: Path, request: State, **settings: Any) -> None:
        super().__init__(**settings)
        self.path, self._request = path, request
        self._awaited: set[str] = set()

    def create_trial(self, tuner_id: str) -> Trial:
        is_known = tuner_id in self.ongoing_trials
        trial = super().create_trial(tuner_id)
        if trial.status != TrialStatus.RUNNING:
            self._tell_who_is_awaited()
        elif not is_known:
            self._write()
        return trial

    def _tell_who_is_awaited(self) -> None:
        """Name the workers whose trials are the last: they may be dead."""
        ids = set(self.ongoing_trials)
        if ids and ids != self._awaited:
            print(
                f"All trials are taken. Still training: {', '.join(sorted(ids))}. The "
                "trial of a worker that has died goes on when you start it again with "
                "the same KERASTUNER_TUNER_ID.",
                flush=True,
            )
        self._awaited = ids

    def take_over(self, tuner_id: str) -> None:
        """Let one process train what workers were training when they were stopped."""
        others = [i for i in self.ongoing_trials if i != tuner_id]
        trials = [self.ongoing_trials.pop(other) for other in others]
        # Trials are taken from its end.
        self._retry_queue += [trial.trial_id for trial in reversed(trials)]

    def end_trial(self, trial: Trial) -> None:
        # A trial from another process has its values in another order.
        trial.hyperparameters = self.trials[trial.trial_id].hyperparameters
        super().end_trial(trial)
        self._write()

    def get_state(self) -> State:
        trials = [trial.get_state() for trial in self.trials.values()]
        return super().get_state() | {"trials": trials}

    def set_state(self, state: State) -> None:
        trials = [Trial.from_state(trial) for trial in state["trials"]]
        self.trials = {trial.trial_id: trial for trial in trials}
        # Gives a running trial again to the process of the same name.
        super().set_state(state)

    def reload(self) -> None:
        state = read_state(self.path)["oracle"]
        try:
            self.set_state(state)
        except Exception as error:
            raise DamagedFileError(self.path, error, REMEDY) from error

    def save(self) -> None:
        """Does nothing: KerasTuner calls it in the middle of a change."""

    def _save_trial(self, trial: Trial) -> None:
        """Does nothing: the state has the trials."""

    def _write(self) -> None:
        state = {"request": self._request, "oracle": self.get_state()}
        write_text(self.path, json.dumps(state) + "\n")


class _Grid(_AtomicOracle, oracles.GridSearchOracle):  # type: ignore[misc]
    def populate_space(self, trial_id: str) -> State:
        proposed: State = super().populate_space(trial_id)
        # KerasTuner lets all but the first trial end before the next one begins, in
        # case it finds new keys. Then no more than two workers would ever train.
        if proposed["status"] == TrialStatus.RUNNING:
            self._populate_next.append(trial_id)
        return proposed

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


class _Random(_AtomicOracle, oracles.RandomSearchOracle):  # type: ignore[misc]
    pass


class _Bayesian(_AtomicOracle, oracles.BayesianOptimizationOracle):  # type: ignore[misc]
    def populate_space(self, trial_id: str) -> State:
        # The random state must follow from the file.
        self._random_state.seed(self.seed + len(self.trials))
        proposed: State = super().populate_space(trial_id)
        running = [t.hyperparameters.values for t in self.ongoing_trials.values()]
        if proposed["values"] in running:
            # Wait for the running trial, whose result will change the proposal.
            return {"status": TrialStatus.IDLE, "values": None}
        return proposed


class _Hyperband(_AtomicOracle, oracles.HyperbandOracle):  # type: ignore[misc]
    pass


SEARCHES: dict[str, Callable[..., _AtomicOracle]] = {
    "grid": _Grid,
    "random": _Random,
    "bayesian": _Bayesian,
    "hyperband": _Hyperband,
}


def read_state(path: Path) -> State:
    """The request and the oracle's state in a file; empty ones before it is written.

    Raises:
        DamagedFileError: if the file cannot be right.
    """
    if not path.exists():
        return {"request": {}, "oracle": {"trials": []}}
    return read_json(path, _check_state, remedy=REMEDY)


def _check_state(content: Any) -> None:
    expect_object(content, request=dict, oracle=dict)
    expect_object(content["oracle"], trials=list)
    for trial in content["oracle"]["trials"]:
        Trial.from_state(trial)
        expect_object(trial, status=str)


class Tuner(BaseTuner):  # type: ignore[misc]
    """Runs the trials of a search.

    Args:
        search: One of `SEARCHES`.
        train: Takes a trial and returns its metrics, the objective among them. After
            a `FloatingPointError` the trial counts as diverged, and the search goes
            on; other errors end it.
        path: File of the state. A search that was stopped goes on from it.
        request: Describes the search, in the file.
        settings: Settings of KerasTuner's oracle.
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
            max_consecutive_failed_trials=None,  # No limit.
            **settings,
        )
        self._train, self._is_worker_process = train, role() == "worker"
        if path.exists() and not self._is_worker_process:
            oracle.reload()
        folder = path.parent
        super().__init__(oracle, directory=folder.parent, project_name=folder.name)
        if role() == "alone":
            oracle.take_over(self.tuner_id)

    def search(self) -> None:
        """Run the trials that are missing, or hand them to the workers.

        Raises:
            Exception: the error of a training, unless it is a `FloatingPointError`.
            OSError: in a worker, if the chief does not answer or could not write.
        """
        try:
            super().search(verbose=0)
        except FatalError as error:
            raise error.__cause__ or error from None
        except Exception as error:
            # Of an error of gRPC, which is imported in the distributed mode alone.
            details = getattr(error, "details", None)
            if details is None or not self._is_worker_process:
                raise
            address = ":".join(os.environ[name] for name in _VARIABLES[:2])
            raise OSError(
                f"The chief at {address} could not do its part: {details()}. Mend that "
                "there, and start this worker again with its ID: finished trainings "
                "are kept."
            ) from error

    def run_trial(self, trial: Trial, verbose: int) -> dict[str, float]:
        try:
            return self._train(trial)
        except FloatingPointError as error:
            raise FailedTrialError(str(error)) from error
        except Exception as error:
            raise FatalError(str(error)) from error

    def pre_create_trial(self) -> None:
        if self._is_worker_process:
            # KerasTuner asks for a trial without a pause while others are running.
            time.sleep(_POLLING_SECONDS)

    def save(self) -> None:
        """Does nothing: the oracle writes its state by itself."""

    def reload(self) -> None:
        """Does nothing: the oracle has read its state."""
