"""How much may be trained, how much was, and how much a training will take."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from keras_nrs.tuning.settings import Setting

Row = dict[str, Any]


class Budget:
    """A budget of minutes, of epochs, of both or of neither.

    It counts finished trainings, those of an earlier call too: a call that is repeated
    then does what the first one would have done.

    Args:
        plain_epochs: Number of epochs of a plain training.
        minutes: Largest time of all trainings together.
        epochs: Largest number of epochs of all trainings together, in plain epochs: one
            with two passes in each step counts as two.
    """

    def __init__(
        self,
        plain_epochs: int,
        *,
        minutes: float | None = None,
        epochs: float | None = None,
    ) -> None:
        self._plain_epochs = plain_epochs
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._epochs = math.inf if epochs is None else epochs
        self._times: dict[str, list[float]] = {}
        self._costs: dict[str, float] = {}
        self.spent_seconds = self.spent_epochs = 0.0

    def spend(self, setting: Setting, row: Row) -> None:
        """Count a finished training."""
        self.spent_seconds += row["seconds"]
        self.spent_epochs += setting.passes * row["epochs_trained"]
        self._times.setdefault(setting.name, []).append(row["seconds"])
        self._costs[setting.name] = setting.cost

    def allows(self, settings: Sequence[Setting], *, share: float = 1.0) -> bool:
        """Whether these trainings fit in what is left of a share of the budget."""
        seconds = self.spent_seconds + self.seconds(settings)
        epochs = self.spent_epochs + sum(
            setting.passes * setting.epochs(self._plain_epochs) for setting in settings
        )
        return seconds <= share * self._seconds and epochs <= share * self._epochs

    def seconds(self, settings: Sequence[Setting]) -> float:
        """How long trainings will take, after those that were done."""
        return sum(map(self._expected, settings))

    def seconds_left(self, settings: Sequence[Setting]) -> float:
        """Time until the end, if these trainings are to do."""
        left = min(self.seconds(settings), self._seconds - self.spent_seconds)
        return max(0.0, left)

    def _expected(self, setting: Setting) -> float:
        """The median time of a setting, or of a plain training times its cost."""
        if setting.name in self._times:
            return statistics.median(self._times[setting.name])
        if not self._times:
            return 0.0
        # The first one is a plain training.
        first = next(iter(self._times))
        return statistics.median(self._times[first]) * setting.cost / self._costs[first]
