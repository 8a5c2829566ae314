"""Runs in several processes, which one parent hands out and writes down."""

import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import BrokenExecutor
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing import parent_process
from pathlib import Path
from statistics import mean

import keras

from keras_nrs._locks import locked
from studies.arms import ARMS
from studies.plan import Cell
from studies.plan import missing
from studies.store import CACHE
from studies.store import Row
from studies.store import Run
from studies.store import Store

ROOT = Path(__file__).parents[1]
# One thread in each process, and no program compiled twice by JAX.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def work(
    folder: Path, cells: Iterable[Cell], *, minutes: float, processes: int
) -> list[tuple[Run, BaseException]]:
    """Do missing runs until the time is over; runs under way are finished.

    Args:
        folder: Folder of the store.
        cells: Tasks and arms, in order of priority.
        minutes: Time in which runs start. One that is expected to take longer than
            what is left does not start.
        processes: Number of runs at a time.

    Returns:
        The runs that raised an error, and the error. They are not tried again.

    Raises:
        InUseError: if another process writes to the folder.
        BrokenExecutor: if a worker was killed.
    """
    end = time.monotonic() + 60 * minutes
    cells = list(cells)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    errors: list[tuple[Run, BaseException]] = []
    running: dict[Future[Row], Run] = {}
    with (
        locked(folder),
        ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_end_with_parent
        ) as pool,
    ):
        store, origin = Store(folder), _origin()

        def next_run() -> Run | None:
            taken = {run.key for run in running.values()}
            taken |= {run.key for run, _ in errors}
            left = end - time.monotonic()
            for cell in cells:
                free = (run for run in missing(store, [cell]) if run.key not in taken)
                run = next(free, None)
                if run is not None and (expected_seconds(store, *cell) or 0) < left:
                    return run
            return None

        while True:
            while len(running) < processes and (run := next_run()) is not None:
                running[pool.submit(timed, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    raise error
                if error is not None:
                    errors.append((run, error))
                    continue
                row = future.result()
                store.add(run, origin | row)
                print(_line(run, row), flush=True)
    return errors


def timed(run: Run) -> Row:
    """What a run measures, and the seconds that it takes."""
    # It imports the backend, which the parent does not need.
    from studies.training import perform

    start, cpu_start = time.perf_counter(), time.process_time()
    measured = perform(run)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "measured": measured,
    }


def expected_seconds(store: Store, task: str, arm: str) -> float | None:
    """Mean time of the cell's finished runs, or else of the task's by their cost."""
    rows = store.rows(task)
    of_cell = [row["seconds"] for row in rows if row["arm"] == arm]
    if of_cell:
        return mean(of_cell)
    costs = [row["seconds"] / ARMS[row["arm"]].cost for row in rows]
    return ARMS[arm].cost * mean(costs) if costs else None


def _end_with_parent() -> None:
    """Let a worker not outlive a parent that was killed."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _origin() -> Row:
    """The commit and the versions that runs are done with."""
    watched = ("keras_nrs", "studies", ":!studies/runs")
    backend = keras.config.backend()
    packages = ("keras", backend, "numpy")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "has_changes": bool(_git("status", "--porcelain", "--", *watched)),
        "backend": backend,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # A copy without its history.
    return result.stdout.strip()


def _line(run: Run, row: Row) -> str:
    measured = row["measured"]
    accuracy = measured.get("accuracy", measured.get("validation_accuracy"))
    return (
        f"{run.task} | {run.arm} | {run.stage} | seed {run.seed} | "
        f"accuracy {accuracy:.4f} | {row['seconds']:.1f} s"
    )
