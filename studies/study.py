"""When does NRS help? A study on data that need no download.

    KERAS_BACKEND=jax python -m studies.study docs/study

Each task of `study_tasks.TASKS` has two stages:

1. Choice: the baseline's learning rate and weight decay, then the eps and alpha of each
   other arm, are those with the best mean accuracy on validation samples over
   `CHOICE_SEEDS` (ties: the lower loss). No test sample is loaded.
2. Test: each arm is trained with the chosen settings and other seeds, `TEST_SEEDS`. For
   each seed the arms share samples, initial weights and batches, so that they can be
   compared in pairs.

Held-out tasks also test two rules: a fixed relative eps, and an eps that follows a
target for the divergence. The settings of a rule were best on average over the
validation samples of the other tasks.

Each task has a CSV file in the folder `runs`, which each finished run is added to. The
same command goes on after a stop, and writes the report of all runs at the end.
"""

import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from keras_nrs.experiments import demo
from keras_nrs.experiments.report import write_report
from keras_nrs.experiments.results import read_runs
from studies.arms import ARMS
from studies.arms import RULES
from studies.arms import Settings
from studies.csv_rows import read_rows
from studies.study_tasks import TASKS
from studies.study_tasks import Task
from studies.task_runs import TEST_SEEDS
from studies.task_runs import TaskRuns


def run_task(task: Task, folder: Path, rules: dict[str, Settings]) -> str:
    """Do the runs of a task that are missing in its file.

    Args:
        task: One of `TASKS`.
        folder: Folder of the CSV files.
        rules: Settings by name of the rule, for held-out tasks.

    Returns:
        The name of the task.
    """
    # The study includes an eps that is too small.
    warnings.filterwarnings("ignore", message=".* has no effect with perturbation")
    runs = TaskRuns(task, folder)
    with runs.store.locked():
        for name in ARMS:
            settings = runs.choose(name)
            for seed in TEST_SEEDS:
                runs.test(name, name, settings, seed)
        shared = runs.choose(demo.BASELINE)
        for rule, settings in rules.items():
            for seed in TEST_SEEDS:
                runs.test(rule, RULES[rule], shared | settings, seed)
    return task.name


def best_on_average(folder: Path, arm: str) -> Settings:
    """An arm's settings with the highest mean gain in validation accuracy.

    The mean is over the tasks that are not held out. The gain is over the best baseline
    of the task.
    """
    means = []
    for settings in ARMS[arm].grid:
        accuracies = [
            [
                row["validation_accuracy"]
                for row in read_rows(folder / f"{task.name}.csv")
                if row["stage"] == "choice" and row["arm"] == arm
                if all(row.get(name) == value for name, value in settings.items())
            ]
            for task in TASKS
            if not task.is_held_out
        ]
        means.append(np.mean([np.mean(values) for values in accuracies]))
    # All settings have the same baselines: mean accuracies rank as mean gains do.
    return ARMS[arm].grid[int(np.argmax(means))]


def main(folder: Path, processes: int = 2) -> None:
    """Do the missing runs, in several processes, and write the report."""
    start = time.perf_counter()
    runs = folder / "runs"
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        rules: dict[str, Settings] = {}
        for held_out in (False, True):
            tasks = [task for task in TASKS if task.is_held_out == held_out]
            # Start the longest tasks first.
            tasks.sort(key=lambda task: task.network != "vit")
            run = partial(run_task, folder=runs, rules=rules)
            for name in pool.map(run, tasks):
                minutes = (time.perf_counter() - start) / 60
                print(f"{name}: finished after {minutes:.1f} minutes", flush=True)
            if not held_out:
                rules = {r: best_on_average(runs, arm) for r, arm in RULES.items()}
                print(f"Rules: {rules}", flush=True)
    write_report(read_runs([runs]), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
