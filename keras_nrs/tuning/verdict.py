"""Which setting is best, by paired differences to plain trainings of its cost."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import numpy as np

from keras_nrs._student_t import mean_and_width
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import rivals_of

Row = dict[str, Any]
# Measurements by name of the setting and seed.
Rows = Mapping[str, Mapping[int, Row]]

# With fewer seeds an interval is wide: for 3 it is 4.3 standard errors to each side.
FEW_SEEDS = 5


@dataclass(frozen=True)
class Difference:
    """A setting's metric minus a rival's, in pairs of equal seeds.

    Attributes:
        rival: The rival.
        num: Number of pairs.
        mean: Mean difference; NaN without a pair.
        width: Half the width of its 95 % confidence interval; NaN for a single pair.
    """

    rival: Setting
    num: int
    mean: float
    width: float


@dataclass(frozen=True)
class Verdict:
    """What the judging seeds say.

    Attributes:
        best: The setting to train with.
        differences: Differences of each setting to its rivals, by name.
        winners: The settings that are better than all their rivals.
        failed: Names of the settings of which a training failed.
        has_baseline_failed: Whether all trainings of the baseline failed.
    """

    best: Setting
    differences: dict[str, list[Difference]] = field(default_factory=dict)
    winners: list[Setting] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    has_baseline_failed: bool = False


def differences(
    setting: Setting, settings: Sequence[Setting], rows: Rows, metric: Metric
) -> list[Difference]:
    """The differences of a setting to its rivals, in the order of their costs."""
    found = []
    own = rows.get(setting.name, {})
    for rival in rivals_of(setting, settings):
        others = rows.get(rival.name, {})
        values = [
            own[seed]["measured"][metric.name] - others[seed]["measured"][metric.name]
            for seed in sorted(own.keys() & others.keys())
            if not own[seed]["failed"] and not others[seed]["failed"]
        ]
        mean, width = mean_and_width(np.array(values)) if values else (math.nan,) * 2
        found.append(Difference(rival, len(values), mean, width))
    return found


def judge(settings: Sequence[Setting], rows: Rows, metric: Metric) -> Verdict:
    """The best setting.

    A setting wins if none of its trainings failed, and the 95 % confidence interval of
    its difference to each rival is on the better side of 0. The rivals are the plain
    trainings that cost no more. Of several winners the one with the best mean is best;
    without any, the baseline.

    Args:
        settings: The settings that were judged, the baseline among them.
        rows: Measurements with the judging seeds.
        metric: The metric that decides.
    """
    baseline = next(setting for setting in settings if setting.is_baseline)
    found, winners = {}, []
    failed = [
        setting.name
        for setting in settings
        if any(row["failed"] for row in rows.get(setting.name, {}).values())
    ]
    for setting in settings:
        found[setting.name] = differences(setting, settings, rows, metric)
        is_better = [
            metric.sign * difference.mean > difference.width
            for difference in found[setting.name]
        ]
        if is_better and all(is_better) and setting.name not in failed:
            winners.append(setting)

    def mean(setting: Setting) -> float:
        values = [row["measured"][metric.name] for row in rows[setting.name].values()]
        return metric.sign * float(np.mean(values))

    of_baseline = rows.get(baseline.name, {}).values()
    has_failed = bool(of_baseline) and all(row["failed"] for row in of_baseline)
    best = max(winners, key=mean, default=baseline)
    return Verdict(best, found, winners, failed, has_failed)


def sentence(verdict: Verdict, metric: Metric, epochs: int) -> str:
    """The decision in a sentence, or in two where few seeds were judged.

    Args:
        verdict: What was judged.
        metric: The metric that decided.
        epochs: Number of epochs of a plain training.
    """
    best = verdict.best
    if verdict.has_baseline_failed:
        return (
            "Keep the baseline, but lower its learning rate first: its trainings "
            "failed, with losses that are not finite."
        )
    judged = {
        name: found
        for name, found in verdict.differences.items()
        if found and all(difference.num for difference in found)
    }
    if not judged and verdict.failed:
        return (
            "Keep the baseline: no setting could be compared with each plain training "
            f"that costs no more. Trainings of {_names(verdict.failed)} failed, with "
            "losses that are not finite."
        )
    if not judged:
        return (
            "Keep the baseline: the budget did not suffice to compare it with a "
            "setting on seeds that judge."
        )
    num = min(difference.num for found in judged.values() for difference in found)
    few = f" Few seeds ({num}) have judged: only large differences show."
    few = few if num < FEW_SEEDS else ""
    if not verdict.winners:
        failed = verdict.failed
        nearest = max(
            judged, key=lambda name: (name not in failed, _margin(judged[name], metric))
        )
        but = ", but some of its trainings failed" if nearest in failed else ""
        return (
            "Keep the baseline: no setting is clearly better than each plain training "
            f"that costs no more. The nearest is {nearest!r}: "
            f"{_texts(judged[nearest], metric)}{but}.{few}"
        )
    found = _texts(verdict.differences[best.name], metric)
    how = f" for {best.epochs(epochs)} epochs" if best.factor != 1 else ""
    if best.is_plain:
        return f"Keep the baseline, and train it{how}: {found}.{few}"
    return f"Train {best.call}{how}: {found}.{few}"


def _names(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _margin(found: list[Difference], metric: Metric) -> float:
    """How much better a setting is than its best rival."""
    return min(metric.sign * difference.mean for difference in found)


def _texts(found: list[Difference], metric: Metric) -> str:
    name, unit = metric.name.replace("_", " "), " points" if metric.is_share else ""
    texts = [
        f"{with_interval(d.mean, d.width, metric)}{unit} against {d.rival.name!r}"
        for d in found
    ]
    return f"{name} {' and '.join(texts)}"


def with_interval(mean: float, width: float, metric: Metric) -> str:
    """A difference and half its 95 % interval; NaN leaves either out.

    It has the metric's digits, or more if these would show no digit of a small value.
    """
    scale = metric.scale
    if math.isnan(mean):
        return ""
    # A width by rounding alone is no width; no float32 is as precise.
    smallest = width if width > 1e-6 * abs(mean) else abs(mean)
    digits = metric.digits
    if 1e-8 < smallest < math.inf:
        digits = max(digits, -math.floor(math.log10(scale * smallest)))
    text = f"{scale * mean:+.{digits}f}"
    return text if math.isnan(width) else f"{text} ± {scale * width:.{digits}f}"
