"""Progress of several trainings on the terminal."""

from types import TracebackType
from typing import Any

import keras
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
from rich.table import Column


class RunProgress(keras.callbacks.Callback):  # type: ignore[misc]
    """A line with the run, its epoch, a bar for all epochs, and the time left.

    Use it as a context, call `start()` before each run, and give it to `fit()` as a
    callback.

    Args:
        runs: Number of runs.
        epochs: Number of epochs of a run.
        console: Where to show it; `None` is standard output.
        metric: A name in the logs whose last value is shown.
    """

    def __init__(
        self,
        runs: int,
        epochs: int,
        console: Console | None = None,
        *,
        metric: str | None = None,
    ) -> None:
        super().__init__()
        self._runs, self._epochs, self._metric = runs, epochs, metric
        self._name, self._started = "", 0
        self._progress = Progress(
            # On two lines of a narrow terminal, rather than cut.
            TextColumn("{task.description}", table_column=Column()),
            BarColumn(bar_width=6),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("", total=runs * epochs)

    def start(self, name: str) -> None:
        """A run begins, or goes on."""
        self._name, self._started = name, self._started + 1
        self._show(0)

    def print(self, text: str) -> None:
        """Print lines above the one that shows the progress."""
        console = self._progress.console
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._show(min(epoch + 1, self._epochs), logs or {})

    def _show(self, epoch: int, logs: Any = ()) -> None:
        text = f"{self._name}: run {self._started}/{self._runs}, "
        text += f"epoch {epoch}/{self._epochs}"
        if self._metric in logs:
            text += f", {self._metric} {logs[self._metric]:.4f}"
        done = (self._started - 1) * self._epochs + epoch
        self._progress.update(self._task, completed=done, description=text)
