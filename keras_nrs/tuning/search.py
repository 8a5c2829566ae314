"""`tune()`: is NRS worth it on these data, and with which setting?"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive
from keras_nrs.tuning.arguments import check_fit
from keras_nrs.tuning.arguments import split_data
from keras_nrs.tuning.budget import Budget
from keras_nrs.tuning.folder import Folder
from keras_nrs.tuning.folder import request_of
from keras_nrs.tuning.race import FIRST_CHOOSING_SEED
from keras_nrs.tuning.race import Race
from keras_nrs.tuning.result import TuneResult
from keras_nrs.tuning.result import table_of
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import settings_from
from keras_nrs.tuning.task import MakeModel
from keras_nrs.tuning.task import Task
from keras_nrs.tuning.verdict import judge
from keras_nrs.tuning.verdict import sentence

Row = dict[str, Any]


def tune(  # noqa: PLR0913
    make_model: MakeModel,
    x: Any,
    y: Any = None,
    *,
    fit: Mapping[str, Any],
    validation_data: Any = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | tuple[str, str] = "auto",
    seeds: int = 5,
    minutes: float | None = None,
    max_epochs: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    verbose: int = 1,
) -> TuneResult:
    """Find out whether NRS is worth it on your data, and with which setting.

    Trains your model as it is, your model for longer, and with settings of
    `keras_nrs.wrap`, each from the start to the end and with several seeds, and says
    which to take: often to keep the baseline.

    **How it decides.** One seed for all settings, another one for the better half, and
    so on, choose two settings. `seeds` other seeds judge these two and the plain
    trainings. With a seed all of them have the same initial weights, so differences are
    taken in pairs. A setting wins if none of its trainings failed (NaN), and the 95 %
    t-interval of its difference to *each* plain training that costs no more is on the
    better side of 0: a setting of two passes must beat the baseline, and the baseline
    with twice the epochs. The baseline with twice the epochs itself must beat the
    baseline. The best of the winners is chosen; without a winner, the baseline. By this
    rule a method that does nothing is chosen in at most 1 of 20 calls.

    Each training sets the seeds of Keras, its backend, NumPy and Python, which stay set
    afterwards: set them again for what your script draws next. The decision holds for
    these validation data, and the metric of the chosen setting is better on them than
    on new data: keep test data out of this call.

    Args:
        make_model: A function that returns a new compiled `keras.Model`, not wrapped,
            with new weights and a new optimizer. If it has a parameter `epochs`, it is
            called with the number of epochs of the training, which the schedule of a
            learning rate needs.
        x: Training inputs: an array of shape `(num_samples, ...)`, a list or dict of
            arrays, or a data set that yields labels too and can be read many times.
        y: Labels, if `x` is arrays.
        fit: Further arguments of `fit()`: `epochs` (those of a plain training, >= 1),
            `batch_size`, `class_weight`, `validation_split` (taken once, at random, in
            place of `validation_data`), ... Of `callbacks` each training has copies of
            its own; or pass a function that returns new ones.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or a data set. They decide.
            With callbacks, which may stop by them, `fit()` gets them too.
        settings: A dict from names to arguments of `wrap()`, in order of promise, with
            `epochs`, a factor, for longer trainings: `{"RPR, twice": {"scheme": "rpr",
            "epochs": 2}}`. `{"scheme": "baseline", "epochs": 4}` is a plain training.
            The baseline, and for each cost among the settings a plain training of that
            cost, are there by themselves. Defaults to NRS (eps 0.2 and 0.4 with alpha
            1, eps 0.4 and 0.6 with alpha 4, filterwise noise of 0.15 with alpha 4),
            RPR, RPR for twice the epochs, and SAM.
        metric: `"loss"`, a metric of `compile()`, or `"calibration_error"` of a
            classifier; a tuple `(name, "max")` or `(name, "min")` for a metric that
            does not say which is better. Defaults to the accuracy, if one is compiled,
            else to the loss.
        seeds: Number of seeds that judge, from 2 to 1000.
        minutes: Largest time of all trainings. No training begins that is not expected
            to end in it; the first half is for choosing. Trainings that the folder has
            from earlier calls count. Without a budget the default settings take
            as long as about 60 plain trainings.
        max_epochs: Largest number of epochs of all trainings, likewise. An epoch with
            two passes in a step counts as two.
        folder: Folder of finished trainings, `best.keras` and `result.json`. The same
            call goes on there, with more time or seeds too. By default all is lost if
            the process ends.
        verbose: 1 prints a line for each training, 0 nothing.

    Returns:
        A `TuneResult`; `print()` it.

    Raises:
        TypeError, ValueError: if an argument is not as described, before any training,
            or the folder has trainings of other data, of another model or `fit`.
        InUseError: if another process uses the folder.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> def make_model():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ...     model.compile("adam", loss, metrics=["accuracy"])
    ...     return model
    >>> x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = np.argmax(x[:, :3], axis=1)
    >>> result = keras_nrs.tune(
    ...     make_model, x[:30], y[:30], validation_data=(x[30:], y[30:]),
    ...     fit={"epochs": 1}, settings={"RPR": {"scheme": "rpr"}}, seeds=2, verbose=0
    ... )
    >>> [row["setting"] for row in result.table]
    ['baseline', 'RPR']
    """
    with _path_of(folder) as path:
        search = prepare(
            make_model,
            x,
            y,
            fit=fit,
            validation_data=validation_data,
            settings=settings,
            metric=metric,
            seeds=seeds,
            minutes=minutes,
            max_epochs=max_epochs,
            folder=path,
            verbose=verbose,
        )
        return search.run()


def prepare(  # noqa: PLR0913
    make_model: MakeModel,
    x: Any,
    y: Any = None,
    *,
    fit: Mapping[str, Any],
    validation_data: Any = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | tuple[str, str] = "auto",
    seeds: int = 5,
    minutes: float | None = None,
    max_epochs: float | None = None,
    folder: Path,
    verbose: int = 1,
) -> "Search":
    """The checked call of `tune()`, before any training.

    Takes and raises what `tune()` does.
    """
    checked_fit = check_fit(fit)
    of_settings = settings_from(settings)
    seeds = check_int("seeds", seeds, minimum=2, maximum=FIRST_CHOOSING_SEED)
    check_int("verbose", verbose, minimum=0, maximum=1)
    for name, value in (("minutes", minutes), ("max_epochs", max_epochs)):
        if value is not None:
            check_positive(name, value)
    data, validation, others = split_data(x, y, validation_data, checked_fit)
    task = Task(make_model, data, validation, others, metric)
    for setting in of_settings:
        task.check_setting(setting)
    _warn_of_schedule(task, of_settings)
    budget = Budget(task.epochs, minutes=minutes, epochs=max_epochs)
    race = Race(of_settings, task.metric, seeds=seeds, budget=budget)
    request = request_of(task.first[0], data, validation, task.described_fit())
    request["metric"] = list(task.metric)
    return Search(task, Folder(folder, request), race, budget, verbose)


class Search:
    """A call of `tune()`, checked.

    Args:
        task: What is trained.
        folder: Where finished trainings are.
        race: Which trainings are done.
        budget: What may be trained.
        verbose: Whether to print a line for each training.
    """

    def __init__(
        self,
        task: Task,
        folder: Folder,
        race: Race,
        budget: Budget,
        verbose: int,
    ) -> None:
        self._task, self._folder, self._race = task, folder, race
        self._budget, self._verbose = budget, verbose
        self._metric = task.metric
        self._settings = [*race.plain, *race.others]
        self._runs: list[Row] = []
        self._was_done = False

    def run(self) -> TuneResult:
        """Train, decide, and load the best model.

        Raises:
            InUseError: if another process uses the folder.
        """
        with self._folder.locked():
            return self._run()

    def _run(self) -> TuneResult:
        self._race.run(self._train, self._report)
        race, metric, plain_epochs = self._race, self._metric, self._task.epochs
        verdict = judge([*race.plain, *race.finalists], race.judging, metric)
        best, epochs = verdict.best, verdict.best.epochs(plain_epochs)
        model = self._task.built_model(epochs)
        self._folder.load_weights(model, best, epochs)
        table = table_of(self._settings, race, verdict, metric)
        trained = {row["setting"] for row in table}
        result = TuneResult(
            decision=sentence(verdict, metric, plain_epochs),
            best=best.name,
            best_arguments=best.arguments,
            best_epochs=epochs,
            best_model=model,
            table=table,
            runs=self._runs,
            metric=metric.name,
            not_run=[s.name for s in self._settings if s.name not in trained],
            seconds=self._budget.spent_seconds,
        )
        written = vars(result).keys() - {"best_model", "runs"}
        self._folder.write_result(model, {k: vars(result)[k] for k in sorted(written)})
        if self._verbose:
            print(f"\n{result}", flush=True)
        return result

    def _train(self, setting: Setting, seed: int, is_judging: bool) -> Row:
        epochs = setting.epochs(self._task.epochs)
        self._was_done = self._folder.has(setting, seed, epochs)
        row = self._folder.get(
            setting,
            seed,
            epochs,
            lambda: self._task.train(setting, seed),
            self._metric if is_judging or setting.is_baseline else None,
        )
        self._runs.append({"setting": setting.name, "is_judging": is_judging} | row)
        return row

    def _report(self, setting: Setting, seed: int, row: Row, left: float) -> None:
        if not self._verbose:
            return
        metric = self._metric
        value = metric.scale * row["measured"][metric.name]
        found = f"{metric.heading} {value:.{metric.digits}f}"
        found = "failed" if row["failed"] else found
        when = ", finished before" if self._was_done else ""
        phase = "choosing" if seed >= FIRST_CHOOSING_SEED else "judging"
        print(
            f"{phase} seed {seed}, {setting.name}: {found}, "
            f"{row['seconds']:.1f} s{when}; about {_duration(left)} left",
            flush=True,
        )


@contextmanager
def _path_of(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder, or one that is deleted at the end."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _warn_of_schedule(task: Task, settings: list[Setting]) -> None:
    """Warn of longer trainings at the end of a schedule for shorter ones."""
    is_longer = any(setting.factor != 1 for setting in settings)
    if is_longer and not task.takes_epochs and task.has_schedule:
        warnings.warn(
            "The optimizer of `make_model` has a schedule of the learning rate, which "
            "longer trainings need another of. Give `make_model` a parameter `epochs`, "
            "and make the schedule from it.",
            stacklevel=4,
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
