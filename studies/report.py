"""The report of the study: tables and a figure for docs/results.md."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_nrs._files import atomic_write
from keras_nrs._files import write_text
from keras_nrs.experiments.report import to_markdown
from keras_nrs.experiments.report_tables import Table
from keras_nrs.experiments.t_test import mean_width
from keras_nrs.experiments.t_test import t_test
from keras_nrs.experiments.t_test import with_interval
from keras_nrs.flatness.palette import Style
from keras_nrs.flatness.palette import styles
from studies.arms import ARMS
from studies.arms import BASELINE
from studies.arms import DEFAULT
from studies.arms import TWICE
from studies.measures import MEASURES
from studies.measures import compared
from studies.measures import measurements
from studies.measures import validation_gains
from studies.plan import TEST_SEEDS
from studies.plan import chosen
from studies.store import PROTOCOL
from studies.store import Store
from studies.tasks import TASKS

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
# What the README shows: the first two arms cost one training, the others two.
_README_ARMS = {
    "label smoothing": "label smoothing, tuned",
    "RPR": "RPR, tuned",
    TWICE: "baseline, twice the epochs",
    DEFAULT: "**NRS by default**",
    "NRS, relative": "NRS relative, tuned",
    "NRS, filterwise": "NRS filterwise, tuned",
    "RPR, twice the epochs": "RPR, tuned, twice the epochs",
    "SAM": "SAM, tuned",
}
_README_TASKS = {
    "mnist1d-cnn-1000": "MNIST-1D, 1,000 sequences, a CNN",
    "fashion-vit-2000": "Fashion-MNIST, 2,000 images, a ViT",
    "fashion-mlp-3000": "Fashion-MNIST, 3,000 images, an MLP",
    "fashion-resnet8-2000": "Fashion-MNIST, 2,000 images, a ResNet",
    "fashion-resnet8-2000-flipped40": "Fashion-MNIST, 40 % wrong labels, a ResNet",
    "fashion-resnet8-100-finetuned": "Fashion-MNIST, 100 images, a ResNet fine-tuned",
}
_README_OUTCOMES = {
    "loss": "Test loss, nats",
    "calibration_error": "Calibration error, points",
    "corrupted": "Accuracy on corrupted inputs, points",
    "rounded_3_filter": "Accuracy with kernels of 3 bits, points",
    "rounded_2_filter": "... of 2 bits",
    "noise_largest_0.1": "... with noise of a tenth of the largest weight",
}
_UNITS = {"accuracy": "points", "loss": "nats"}
_SIGNIFICANT = 0.05
# Ways to pay less than two plain trainings, and what that price must be compared with.
_BELOW_TWO = (
    "RPR",
    "NRS, samples shared out, no divergence",
    "NRS, last third of the epochs",
    "NRS, samples shared out",
    "NRS, EMA as the reference",
    "NRS, every second step",
    "NRS, half of each batch",
    "NRS, a growing share of the steps",
    "RPR, 1.5 times the epochs",
    TWICE,
    "SAM",
    "NRS, relative",
    "RPR, twice the epochs",
)
_BELOW_TWO_OUTCOMES = {
    "accuracy": "accuracy (points)",
    "loss": "loss (nats)",
    "rounded_2_filter": "2 bits (points)",
}
FIGURE = "accuracy_by_cost.png"
# Accuracy against cost, from left to right.
_LINES = {
    "plain": (BASELINE, TWICE, "baseline, four times the epochs"),
    "RPR": ("RPR", "RPR, twice the epochs", "RPR, four times the epochs"),
    "NRS, relative": ("NRS, relative", "NRS, relative, twice the epochs"),
    "NRS, filterwise": ("NRS, filterwise",),
    "NRS, by default": (DEFAULT,),
    "SAM": ("SAM",),
    "label smoothing": ("label smoothing",),
}
_SUMMARIZED = (
    *("accuracy", "loss", "calibration_error", "corrupted", "rounded_3_filter"),
    *("rounded_2_filter", "noise_filter_0.2"),
)


def write_report(
    store: Store, page: Path, figures: Path, readme: Path, cost: Path
) -> None:
    """Write the tables between two markers of three pages, and the figure.

    Args:
        store: The finished runs.
        page: A Markdown file with the lines `BEGIN` and `END`, for all tables.
        figures: Folder of the figure.
        readme: Another one, for the table of gains.
        cost: Another one, for the table of trainings that cost less than two.

    Raises:
        ValueError: if a page lacks a marker, or no test run is finished.
    """
    for path in (page, readme, cost):
        _check_markers(path)
    runs = {task: measurements(store, task) for task in TASKS}
    runs = {task: found for task, found in runs.items() if len(found)}
    if not runs:
        raise ValueError(
            f"The store must have finished test runs. Received: {str(store.folder)!r}. "
            "Do some first: python -m studies --minutes 60."
        )
    figures.mkdir(parents=True, exist_ok=True)
    with atomic_write(figures / FIGURE) as unfinished:
        accuracy_by_cost(runs).savefig(unfinished, format="png", dpi=150)
    image = f"![Test accuracy against cost]({figures.name}/{FIGURE})"
    tables = [summary(runs)]
    for task, found in runs.items():
        tables += [accuracies(store, task, found), outcomes(task, found)]
    parts = [
        f"Protocol {PROTOCOL}: [what was done](../studies/PROTOCOL.md).",
        image,
        *(to_markdown(table) for table in tables if len(table.cells)),
        *worst_of_default(runs),
        *failures(store, runs),
        not_run(store),
    ]
    _put(page, "\n\n".join(part.strip() for part in parts))
    _put(readme, gains(runs))
    _put(cost, below_two(runs))


def _check_markers(page: Path) -> None:
    if not re.search(f"{BEGIN}.*{END}", page.read_text("utf-8"), re.DOTALL):
        raise ValueError(
            f"The page must have the lines {BEGIN} and {END}, in this order. Received: "
            f"{str(page)!r}. Add them where the tables shall stand."
        )


def _put(page: Path, made: str) -> None:
    """Write text between the markers of a page."""
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n{made}\n{END}{after}")


def gains(runs: dict[str, pd.DataFrame]) -> str:
    """A Markdown table of differences to the baseline.

    It has a row for each task, of accuracies, in bold where a gain is significant
    after the adjustment; and one for each other outcome, the mean over the main tasks
    in which every arm of the table is finished.
    """
    rows = [["accuracy, points", *_README_ARMS.values()]]
    rows.append(["---"] * len(rows[0]))
    complete: dict[int, str] = {}
    for task, title in _README_TASKS.items():
        found = compared(runs[task], "accuracy") if task in runs else pd.DataFrame()
        cells = [_gain(found, arm) for arm in _README_ARMS]
        if any(cells):
            rows.append([title, *cells])
        if all(cells) and TASKS[task].is_main:
            complete[len(rows) - 2] = task
    if complete:
        among = ", ".join(str(row) for row in complete)
        rows.append([f"*others, mean of rows {among}:*", *[""] * len(_README_ARMS)])
    for name, title in _README_OUTCOMES.items():
        tests = [compared(runs[t], name) for t in complete.values() if name in runs[t]]
        if tests:
            rows.append(
                [title, *(_mean_gain(tests, name, arm) for arm in _README_ARMS)]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_gain(tests: list[pd.DataFrame], name: str, arm: str) -> str:
    """A mean over tasks of differences to the baseline, with its interval."""
    found = pd.concat(tests)
    of_arm = found[(found["arm"] == arm) & (found["reference"] == BASELINE)]
    return _mean_difference(of_arm, name)


def _mean_difference(tests: pd.DataFrame, name: str) -> str:
    """The mean of differences, a row for each task, with its interval."""
    measure = MEASURES[name]
    return with_interval(
        measure.scale * tests["mean"].mean(),
        measure.scale * mean_width(tests),
        measure.digits,
    )


def _gain(found: pd.DataFrame, arm: str) -> str:
    """A difference to the baseline in points, in bold if it is no accident."""
    if found.empty:
        return ""
    of_arm = found[(found["arm"] == arm) & (found["reference"] == BASELINE)]
    if of_arm.empty or of_arm.iloc[0]["n"] < len(TEST_SEEDS):
        return ""
    test = of_arm.iloc[0]
    text = with_interval(100 * test["mean"], 100 * test["width"], 1)
    is_gain = test["mean"] > 0 and test["adjusted"] < _SIGNIFICANT
    return f"**{text}**" if is_gain else text


def below_two(runs: dict[str, pd.DataFrame]) -> str:
    """A Markdown table of differences to the baseline, by cost.

    It has the tasks for which every arm of the table is finished.
    """
    tests = {
        (task, name): compared(found, name)
        for task, found in runs.items()
        for name in _BELOW_TWO_OUTCOMES
        if name in found
    }
    tests = {key: found for key, found in tests.items() if len(found)}
    complete = [
        task
        for task in dict.fromkeys(task for task, _ in tests)
        if all(_gain(tests[task, "accuracy"], arm) for arm in _BELOW_TWO)
    ]
    columns = [key for key in tests if key[0] in complete]
    heading = ["training", "cost"]
    heading += [
        f"{_README_TASKS.get(task, task)}: {_BELOW_TWO_OUTCOMES[name]}"
        for task, name in columns
    ]
    rows = [heading, ["---"] * len(heading)]
    for arm in _BELOW_TWO:
        rows.append([arm, f"{ARMS[arm].cost:.2g}"])
        for task, name in columns:
            found = tests[task, name]
            of_arm = found[(found["arm"] == arm) & (found["reference"] == BASELINE)]
            rows[-1].append(_mean_difference(of_arm, name))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracies(store: Store, task: str, runs: pd.DataFrame) -> Table:
    """Accuracy and loss of each arm, and its differences to both references."""
    tests = {name: compared(runs, name) for name in ("accuracy", "loss")}
    rows = []
    for arm, of_arm in runs.groupby("arm", sort=False):
        row = {
            "training": arm,
            "settings, where not the baseline's": described(store, task, arm),
            "cost": f"{ARMS[arm].cost:.2g}",
            "seeds": f"{len(of_arm)}",
        }
        for name, found in tests.items():
            row[MEASURES[name].heading] = mean_and_spread(of_arm, name)
            for other, reference in (
                ("baseline's", BASELINE),
                ("that of twice", TWICE),
            ):
                heading = f"{name} - {other} ({_UNITS[name]})"
                row[heading] = difference(found, arm, reference, name)
        rows.append(row)
    title = (
        f"{task}: mean ± standard deviation over test seeds, and the mean paired "
        "difference ± half its 95 % interval (p adjusted by Holm) to the baseline and "
        "to the baseline with twice the epochs. Cost in plain trainings"
    )
    return Table(task, title, pd.DataFrame(rows))


def outcomes(task: str, runs: pd.DataFrame) -> Table:
    """The other measures of each arm."""
    names = [
        name
        for name in MEASURES
        if name not in ("accuracy", "loss")
        and name in runs
        and runs[name].notna().any()
    ]
    rows = [
        {"training": arm}
        | {MEASURES[name].heading: mean_and_spread(of_arm, name) for name in names}
        for arm, of_arm in runs.groupby("arm", sort=False)
    ]
    title = f"{task}: the other outcomes, mean ± standard deviation"
    if TASKS[task].noise:
        title += ". The CPU time includes that of validation after each epoch"
    return Table(f"{task}-outcomes", title, pd.DataFrame(rows))


def summary(runs: dict[str, pd.DataFrame]) -> Table:
    """For each outcome, the mean over main tasks of the difference to the baseline."""
    rows = []
    main = [task for task in runs if TASKS[task].is_main]
    groups = {"": [task for task in main if not TASKS[task].noise]}
    groups[", wrong labels"] = [task for task in main if TASKS[task].noise]
    for ending, tasks in groups.items():
        for name in [*_SUMMARIZED, *(["best_epoch_accuracy"] if ending else [])]:
            found = [compared(runs[task], name) for task in tasks if name in runs[task]]
            found = [part for part in found if len(part)]
            if not found:
                continue
            tests = pd.concat(found)
            tests = tests[tests["reference"] == BASELINE]
            heading = MEASURES[name].heading.replace("(%)", "(points)")
            row = {"outcome": heading + ending}
            for arm in ARMS:
                of_arm = tests[tests["arm"] == arm]
                if not ARMS[arm].is_main or of_arm.empty:
                    continue
                row[arm] = _mean_difference(of_arm, name)
                if len(of_arm) < len(found):
                    row[arm] += f" ({len(of_arm)} of {len(found)} tasks)"
            rows.append(row)
    title = (
        "Mean over main tasks of the difference to the baseline ± half its 95 % "
        "interval: " + "; ".join(", ".join(tasks) for tasks in groups.values() if tasks)
    )
    cells = pd.DataFrame(rows)
    return Table("summary", title, cells.fillna(""))


def mean_and_spread(runs: pd.DataFrame, name: str) -> str:
    """Mean ± standard deviation over seeds."""
    measure = MEASURES[name]
    values = measure.scale * runs[name].dropna() if name in runs else pd.Series()
    if values.empty:
        return ""
    text = f"{values.mean():.{measure.digits}f}"
    spread = values.std(ddof=1)
    return text if np.isnan(spread) else f"{text} ± {spread:.{measure.digits}f}"


def difference(found: pd.DataFrame, arm: str, reference: str, name: str) -> str:
    """A paired difference, its interval and its adjusted p-value."""
    if found.empty:
        return ""
    rows = found[(found["arm"] == arm) & (found["reference"] == reference)]
    if rows.empty:
        return ""
    test, measure = rows.iloc[0], MEASURES[name]
    text = with_interval(
        measure.scale * test["mean"], measure.scale * test["width"], measure.digits
    )
    if np.isnan(test["adjusted"]):
        return text
    p = "< 0.001" if test["adjusted"] < 0.001 else f"{test['adjusted']:.3f}"
    return f"{text} (p {p})"


def described(store: Store, task: str, arm: str) -> str:
    """What an arm has chosen."""
    settings = chosen(store, task, arm) or {}
    shared = {} if arm == BASELINE else chosen(store, task, BASELINE) or {}
    hidden = {"scheme", "normalize", "beta", "epochs", "interval"}
    hidden |= {"perturbed_fraction", "perturbed_from", "share_grows"}
    hidden |= {"in_both_passes", "reference_momentum"}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if name not in hidden and shared.get(name) != value
    )


def worst_of_default(runs: dict[str, pd.DataFrame]) -> list[str]:
    """A line with the default's worst difference of accuracy to the baseline."""
    tests = [compared(found, "accuracy").assign(task=t) for t, found in runs.items()]
    tests = [found for found in tests if len(found)]
    if not tests:
        return []
    found = pd.concat(tests, ignore_index=True)
    found = found[(found["arm"] == DEFAULT) & (found["reference"] == BASELINE)]
    if found.empty:
        return []
    worst = found.loc[found["mean"].idxmin()]
    text = with_interval(100 * worst["mean"], 100 * worst["width"])
    return [
        f"The default's worst difference to the baseline, of {len(found)} tasks: "
        f"{text} points of accuracy, {worst['task']}."
    ]


def failures(store: Store, runs: dict[str, pd.DataFrame]) -> list[str]:
    """Lines that name the failed test runs, and count those of the choice."""
    tests = [
        f"{task}: {arm}, seed {seed}"
        for task, found in runs.items()
        for arm, seed in found.loc[found["failed"], ["arm", "seed"]].to_numpy()
    ]
    choices = Counter(
        f"{task}: {row['arm']}"
        for task in runs
        for row in store.rows(task)
        if row["measured"].get("validation_failed")
    )
    counted = "; ".join(f"{name} ({n})" for name, n in choices.items())
    return [
        f"Failed test runs, at chance: {'; '.join(tests) or 'none'}.",
        f"Failed runs of the choice: {counted or 'none'}.",
    ]


def not_run(store: Store) -> str:
    """A line that names what is not finished."""
    missing = []
    starts = {task.starts_from for task in TASKS.values()}
    for task in TASKS:
        if task == "smoke" or task in starts:
            continue
        counts = measurements(store, task)
        done = counts["arm"].value_counts() if len(counts) else {}
        wanted = [arm for arm in ARMS if ARMS[arm].trains(task)]
        arms = [arm for arm in wanted if done.get(arm, 0) < len(TEST_SEEDS)]
        if arms == wanted:
            missing.append(f"{task} (all arms)")
        elif arms:
            missing.append(f"{task} ({'; '.join(arms)})")
    return f"Not run, or not to the end: {'; '.join(missing) or 'nothing'}."


def accuracy_by_cost(runs: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy against cost: a panel for each task, 95 % intervals of the mean."""
    runs = {task: runs[task] for task in _README_TASKS if task in runs} or runs
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    drawn = {arm for arms in _LINES.values() for arm in arms}
    highest = max(
        (ARMS[a].cost for found in runs.values() for a in drawn & set(found["arm"])),
        default=1,
    )
    for axes, (task, found) in zip(panels.flat, runs.items(), strict=False):
        axes.set_title(_README_TASKS.get(task, task), fontsize=10)
        style_of = styles(_LINES)
        for i, (label, arms) in enumerate(_LINES.items()):
            _draw_line(axes, found, arms, label=label, place=i, style=style_of[label])
        axes.set_xscale("log", base=2)
        costs = [c for c in (1, 2, 4) if c <= highest]
        axes.set_xticks(costs, [str(cost) for cost in costs])
        axes.set_xlim(0.8, 1.25 * highest)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    for axes in panels.flat[len(runs) :]:
        axes.remove()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * columns)
    figure.supxlabel("cost (plain trainings)")
    figure.supylabel("test accuracy (%), mean and 95 % interval")
    return figure


def _draw_line(
    axes: Any,
    runs: pd.DataFrame,
    arms: tuple[str, ...],
    *,
    label: str,
    place: int,
    style: Style,
) -> None:
    points = []
    for arm in arms:
        values = 100 * runs.loc[runs["arm"] == arm, "accuracy"].to_numpy(float)
        if len(values):
            test = t_test(values)
            points.append((ARMS[arm].cost, test.mean, np.nan_to_num(test.width)))
    costs, means, widths = np.array(points).reshape(-1, 3).T
    axes.errorbar(
        # Intervals of the same cost stand beside each other.
        costs * 1.02 ** (place - 2),
        means,
        yerr=widths,
        marker=style.marker,
        label=label,
        **style.line,
        capsize=2,
    )


def defaults_table(store: Store) -> str:
    """For each setting of NRS its validation gains, best worst case first."""
    tasks = [t for t in TASKS if chosen(store, t, BASELINE) is not None]
    gains = validation_gains(store, tasks)
    shown = gains.map(lambda v: "" if np.isnan(v) else f"{100 * v:+.2f}")
    return shown.rename_axis("setting").to_string()
