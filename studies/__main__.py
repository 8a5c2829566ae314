"""The study: `KERAS_BACKEND=jax python -m studies --minutes 10`.

Every call does runs that are missing, in order of priority. PROTOCOL.md says what a run
is; `--list` shows how many are done; `report` writes the tables and the figure of
docs/results.md and the tables of README.md and docs/cost.md; `default` compares
settings for all tasks.
"""

import argparse
import os
import sys
from pathlib import Path

from studies.arms import ARMS
from studies.plan import cells
from studies.plan import number_of_runs
from studies.plan import runs_of
from studies.report import defaults_table
from studies.report import write_report
from studies.store import Store
from studies.tasks import TASKS
from studies.workers import ROOT
from studies.workers import expected_seconds
from studies.workers import work


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's arguments, checked."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=("run", "report", "default"), default="run"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="time in which runs start"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "studies" / "runs",
        help="folder of the store",
    )
    parser.add_argument(
        "--list", action="store_true", help="show what is done, and do nothing"
    )
    parsed = parser.parse_args(arguments)
    if parsed.minutes <= 0:
        parser.error(f"--minutes must be > 0. Received: {parsed.minutes}.")
    if parsed.processes < 1:
        parser.error(f"--processes must be >= 1. Received: {parsed.processes}.")
    return parsed


def listing(store: Store, of_cells: list[tuple[str, str]]) -> str:
    """A line for each task and arm: runs done and missing, and minutes to go."""
    lines = [f"{'task':36} {'arm':38} {'done':>5} {'missing':>8} {'minutes':>8}"]
    total = 0.0
    for task, arm in of_cells:
        done = sum(store.get(run) is not None for run in runs_of(store, task, arm))
        left = number_of_runs(task, arm) - done
        seconds = expected_seconds(store, task, arm)
        minutes = "?" if seconds is None else f"{left * seconds / 60:.1f}"
        total += left * (seconds or 0.0) / 60
        lines.append(f"{task:36} {arm:38} {done:5} {left:8} {minutes:>8}")
    lines.append(f"{total:.0f} minutes of one process, without those of '?'.")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command, and return its exit code."""
    parsed = parse(arguments)
    chosen = cells(parsed.tasks, parsed.arms)
    if parsed.list:
        print(listing(Store(parsed.folder), chosen))
        return 0
    if parsed.command == "default":
        print(defaults_table(Store(parsed.folder)))
        return 0
    if parsed.command == "report":
        docs = ROOT / "docs"
        page, readme, cost = docs / "results.md", ROOT / "README.md", docs / "cost.md"
        write_report(Store(parsed.folder), page, docs / "study", readme, cost)
        return 0
    errors = work(
        parsed.folder, chosen, minutes=parsed.minutes, processes=parsed.processes
    )
    for run, error in errors:
        print(f"{run.key} failed: {error!r}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
