"""Which trainings are done, in which order.

Some seeds choose: all settings have a first one, the better half a second one, until
two settings are left. Other seeds judge: the two and the plain trainings have all of
them. So the luck by which a setting was chosen is not in the differences that judge it.
"""

import math
from collections.abc import Callable
from typing import Any

from keras_nrs.tuning.budget import Budget
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import rivals_of

Row = dict[str, Any]
# A setting, a seed, and whether it judges.
Train = Callable[[Setting, int, bool], Row]
Report = Callable[[Setting, int, Row, float], None]

FINALISTS = 2
FIRST_CHOOSING_SEED = 1000
# Share of the budget in which trainings that choose may start.
CHOOSING_SHARE = 0.5


class Race:
    """The trainings of a call of `tune()`.

    Args:
        settings: Plain trainings, and settings in order of promise.
        metric: The metric that chooses.
        seeds: Number of seeds that judge.
        budget: What may be trained.

    Attributes:
        choosing: Measurements by name of the setting and seed.
        judging: Likewise, with the seeds that judge.
        finalists: The settings that are judged.
    """

    def __init__(
        self, settings: list[Setting], metric: Metric, *, seeds: int, budget: Budget
    ) -> None:
        self.plain = [setting for setting in settings if setting.is_plain]
        self.others = [setting for setting in settings if not setting.is_plain]
        self._metric, self._seeds, self._budget = metric, seeds, budget
        self.choosing: dict[str, dict[int, Row]] = {}
        self.judging: dict[str, dict[int, Row]] = {}
        self.finalists: list[Setting] = []
        self._todo: list[Setting] = []

    def run(self, train: Train, report: Report) -> None:
        """Do the trainings.

        Args:
            train: Trains a setting with a seed; the third argument is whether it
                judges.
            report: Called after each training, with the seconds that are left.

        The baseline is trained in any case.
        """
        self._train, self._report = train, report
        baseline = next(setting for setting in self.plain if setting.is_baseline)
        left = self._choose()
        self.finalists = left[:FINALISTS]
        rounds = [*self.plain, *self.finalists] * self._seeds
        if not self._budget.allows(rounds):
            self.finalists = left[:1]
        self._judge()
        if baseline.name not in self.choosing | self.judging:
            self._do(baseline, 0, self.judging, [])

    def _choose(self) -> list[Setting]:
        """The settings that are left, the best first."""
        sizes = rung_sizes(len(self.others))
        left = self.others
        for rung, size in enumerate(sizes):
            left = left[:size]
            following = [s for n in sizes[rung + 1 :] for s in self.plain + left[:n]]
            following += [*self.plain, *left[:FINALISTS]] * self._seeds
            is_whole = self._rung(
                self.plain + left, FIRST_CHOOSING_SEED + rung, following
            )
            tried = [s for s in left if s.name in self.choosing]
            gains = {s.name: self.gain(s) for s in tried}
            tried.sort(key=lambda s: gains[s.name], reverse=True)
            working = [s for s in tried if gains[s.name] > -math.inf]
            left = working if tried else left[:1]
            if not is_whole:
                break
        return left

    def _rung(self, todo: list[Setting], seed: int, following: list[Setting]) -> bool:
        """Train settings with a seed. Whether the budget allowed for all of them."""
        for i, setting in enumerate(todo):
            if not self._budget.allows([setting], share=CHOOSING_SHARE):
                return False
            self._do(setting, seed, self.choosing, todo[i + 1 :] + following)
        return True

    def _judge(self) -> None:
        entrants = [*self.plain, *self.finalists]
        for seed in range(self._seeds):
            if not self._budget.allows(entrants):
                return
            following = entrants * (self._seeds - seed - 1)
            for i, setting in enumerate(entrants):
                self._do(setting, seed, self.judging, entrants[i + 1 :] + following)

    def _do(
        self,
        setting: Setting,
        seed: int,
        rows: dict[str, dict[int, Row]],
        following: list[Setting],
    ) -> None:
        row = self._train(setting, seed, rows is self.judging)
        rows.setdefault(setting.name, {})[seed] = row
        self._budget.spend(setting, row)
        self._report(setting, seed, row, self._budget.seconds_left(following))

    def gain(self, setting: Setting) -> float:
        """How much better a setting is than its best rival, with the choosing seeds.

        Of equal seeds, in the mean over them; minus infinity if a training failed.
        """
        own = self.choosing[setting.name]
        gains = []
        for rival in rivals_of(setting, self.plain):
            pairs = [
                (own[seed], other)
                for seed, other in self.choosing.get(rival.name, {}).items()
                if seed in own and not other["failed"]
            ]
            gains += [math.fsum(map(self._gain, pairs)) / len(pairs)] if pairs else []
        if any(row["failed"] for row in own.values()):
            return -math.inf
        return min(gains, default=0.0)

    def _gain(self, pair: tuple[Row, Row]) -> float:
        ours, theirs = (row["measured"][self._metric.name] for row in pair)
        return self._metric.sign * (ours - theirs)


def rung_sizes(num_settings: int) -> list[int]:
    """Numbers of settings with a first choosing seed, a second one, and so on."""
    sizes = []
    while num_settings > FINALISTS:
        sizes.append(num_settings)
        num_settings = max(FINALISTS, math.ceil(num_settings / 2))
    return sizes
