"""Callbacks for `fit()`."""

import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from keras_nrs import perturbations
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs.batches import check_data

# Below this share of the loss the divergence has no measurable effect on training.
_INERT_SHARE = 1e-4
# Whose eps is a share of the weights' norm.
_RELATIVE = (perturbations.RelativeBall, perturbations.LayerwiseBall)
# The terms of the objective that are in the logs.
_TERMS = ("loss", "perturbed_loss", "model_divergence")
# The length of delta is random. One step alone may have drawn a short one.
_FEWEST_STEPS = 2
# The outputs of a new model are uniform, and change little until it has learned.
_ENOUGH_STEPS = 100


class EpsWarnings(keras.callbacks.Callback):  # type: ignore[misc]
    """Warns if eps is so small that the divergence cannot matter, or too large.

    Added by `NRSModel.fit()`. It compares alpha times the mean divergence of each
    epoch with the loss of the first one (later losses may be next to nothing), until
    that is large enough, and speaks if it never was: after 100 steps and the end of
    their epoch, or at the end of a shorter training. It is silent if `eps` or `alpha`
    is 0, or if one of them was assigned since training began. When training begins it
    speaks of a relative eps above 1, with which delta may be longer than the weights.

    After each epoch it looks for terms of the objective that are not finite in the
    logs, which are there without waiting for any step, and says so once.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        self._are_finite = True
        self._first_step = self._last_step = self._step()
        values = _values(model)
        # Kept for the next `fit()`, which may go on from this one.
        if model._eps_record is None or model._eps_record.values != values:
            matters = model.scheme == "nrs" and 0 not in values
            model._eps_record = SimpleNamespace(
                values=values,
                is_open=matters,
                steps=0.0,
                num_epochs=0,
                divergence=0.0,
                loss=math.nan,
            )
        eps, _ = values
        kind = type(model.perturbation)
        if kind in _RELATIVE and eps > 1 and model.scheme != "baseline":
            _warn(
                f"eps={eps:.3g} is more than perturbation {kind.__name__} can do with: "
                "delta may be longer than the weights. Above 0.5 training can diverge; "
                "start with 0.15 to 0.5."
            )

    def _step(self) -> int:
        state = keras.ops.convert_to_numpy(self.model.seed_generator.state)
        return int(state[1])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = logs or {}
        faults = {name: float(logs[name]) for name in _TERMS if name in logs}
        faults = {name: v for name, v in faults.items() if not math.isfinite(v)}
        if faults and self._are_finite:
            self._warn_of_faults(epoch, faults)
        self._are_finite = self._are_finite and not faults
        steps = (self._step() - self._last_step) / self.model.interval
        self._last_step = self._step()
        record = self.model._eps_record
        # An epoch of a warm-up says nothing of the values that it leads to.
        if not record.is_open or _values(self.model) != record.values:
            return
        if record.num_epochs == 0:
            record.loss = float(logs.get("loss", math.nan))
        record.num_epochs += 1
        record.steps += steps
        divergence = float(logs.get("model_divergence", math.nan))
        record.divergence = max(record.divergence, divergence)
        _, alpha = record.values
        record.is_open = alpha * record.divergence < _INERT_SHARE * record.loss
        if record.is_open and record.steps >= _ENOUGH_STEPS:
            self._warn_of_inert_eps()

    def on_train_end(self, logs: Any = None) -> None:
        record = self.model._eps_record
        if record.is_open and record.steps >= _FEWEST_STEPS:
            self._warn_of_inert_eps()

    def _warn_of_faults(self, epoch: int, faults: dict[str, float]) -> None:
        weights = map(keras.ops.convert_to_numpy, self.model.trainable_variables)
        are_finite = all(np.isfinite(w.astype("float32")).all() for w in weights)
        steps = ""
        if self.model.scheme != "baseline":
            steps = f", up to step {self._step() - self._first_step} of fit()"
        eps, alpha = _values(self.model)
        advice = "Look for NaN in the data, and lower the learning rate."
        if set(faults) != {"loss"}:
            advice = (
                f"If it is the perturbed pass, eps={eps:.3g} is too large: with "
                "perturbation='relative' take 0.3 or less, or see "
                "keras_nrs.calibrate_eps; if it is not, look for NaN in the data, and "
                "lower the learning rate."
            )
        state = "still finite" if are_finite else "not finite either: start again"
        _warn(
            f"In epoch {epoch + 1}{steps}, the mean "
            f"{' and '.join(f'{name} is {value}' for name, value in faults.items())} "
            f"(eps={eps:.3g}, alpha={alpha:.3g}). The weights are {state}. {advice} "
            "keras.callbacks.TerminateOnNaN() stops at the first such step, and this "
            "warning then names its terms alone."
        )

    def _warn_of_inert_eps(self) -> None:
        record = self.model._eps_record
        record.is_open = False
        if not self.model.trainable_variables:
            return
        eps, alpha = record.values
        weights = [w.value for w in self.model.trainable_variables]
        norm = float(keras.ops.convert_to_numpy(perturbations.norm(weights)))
        calibrate = (
            "find an eps with keras_nrs.calibrate_eps(model, x, target_divergence=0.02)"
        )
        advice = (
            "Use wrap(model, eps=0.3, perturbation='relative'), whose radius grows "
            f"with that norm, or {calibrate}."
        )
        if isinstance(self.model.perturbation, _RELATIVE):
            advice = (
                "A new model's outputs may be too uniform to change: look at "
                f"model_divergence again later, and if it is as small, {calibrate}."
            )
        if record.divergence >= _INERT_SHARE * record.loss:
            advice = f"alpha={alpha:.3g} is too small: start with 1."
        num = record.num_epochs
        _warn(
            f"eps={eps:.3g} has no effect with perturbation "
            f"{type(self.model.perturbation).__name__}: after "
            f"{f'{num} epochs' if num > 1 else 'an epoch'} the largest mean model "
            f"divergence was {record.divergence:.2g}, and alpha * divergence "
            f"{alpha * record.divergence / record.loss:.1g} of the first epoch's loss. "
            f"The norm of the weights is {norm:.3g}. {advice}"
        )


def _warn(text: str) -> None:
    """Warn with the place of the user's `fit()`, which is far up from a callback."""
    packages = tuple(
        os.path.dirname(file) + os.sep for file in (keras.__file__, __file__)
    )
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(packages):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class NRSSchedule(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets eps and alpha of an `NRSModel` at the beginning of each epoch.

    Both are 0 before `start_epoch`, and grow linearly to their value over
    `warmup_epochs`: the first of these has `1 / warmup_epochs` of it. Nothing is
    compiled again. The values of an epoch are in its logs, as `eps` and `alpha`.
    Training may be stopped and go on at any epoch (`initial_epoch`, a backup, a saved
    model): a value depends on the epoch alone.

    With eps = 0 and alpha = 0 a step still has its second pass, and its loss twice;
    `wrap(normalize=True)` leaves the loss as it is.

    Args:
        eps: A number >= 0, or a function from the epoch (counted from 0) to it, which
            warm-up multiplies. Defaults to the value that was given to `wrap()` or
            assigned (`model.eps = 0.2`) last, which the model has again at the end.
        alpha: As `eps`.
        start_epoch: First epoch with a perturbation, >= 0.
        warmup_epochs: Number of epochs, >= 0, until the full value is reached.

    Raises:
        TypeError, ValueError: if an argument is not as described, or at the beginning
            of training if the model is not wrapped.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    model.fit(x, y, epochs=50, callbacks=[NRSSchedule(start_epoch=5, warmup_epochs=10)])
    ```
    """

    def __init__(
        self,
        eps: float | Callable[[int], float] | None = None,
        alpha: float | Callable[[int], float] | None = None,
        *,
        start_epoch: int = 0,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        self._given = {"eps": eps, "alpha": alpha}
        for name, value in self._given.items():
            if value is not None and not callable(value):
                check_nonnegative(name, value)
        self.start_epoch = check_int("start_epoch", start_epoch, minimum=0)
        self.warmup_epochs = check_int("warmup_epochs", warmup_epochs, minimum=0)

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if not hasattr(model, "base_model"):
            raise TypeError(
                "NRSSchedule needs an NRSModel. Received: a "
                f"{type(model).__name__}. Wrap it: keras_nrs.wrap(model)."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        since_start = epoch - self.start_epoch
        factor = min(1.0, (since_start + 1) / max(1, self.warmup_epochs))
        for name, given in self._given.items():
            value = getattr(self.model._targets, name) if given is None else given
            value = check_nonnegative(name, value(epoch) if callable(value) else value)
            value = value * factor if since_start >= 0 else 0.0
            getattr(self.model, name).assign(value)

    def on_train_end(self, logs: Any = None) -> None:
        for name, given in self._given.items():
            if given is None:
                getattr(self.model, name).assign(getattr(self.model._targets, name))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["eps"], logs["alpha"] = _values(self.model)


class FlatnessMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures flatness during training, on data that is held out or on any other.

    After every `every`-th epoch, and in inference mode, adds to the logs

    - `val_model_divergence`: the mean model divergence, if `eps` is given or the model
      is wrapped;
    - `val_eigenvalue`, or `val_eigenvalue_1` to `val_eigenvalue_k`: the largest
      eigenvalues of the Hessian.

    They are in the history, the progress bar and TensorBoard, like validation logs:
    only at epochs at which they were measured. Put this callback before those that read
    logs, such as `TensorBoard`, `CSVLogger` or `ModelCheckpoint`. It works for models
    that are not wrapped, too. Needs `keras-nrs[flatness]`. Callbacks that watch one of
    them, such as `EarlyStopping`, need `mode="min"`.

    Args:
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`; a
            generator will not do, as it runs once.
        y: Labels, if `x` is arrays.
        every: Number of epochs between measurements, >= 1.
        k: Number of eigenvalues, >= 0.
        eps: Size of the perturbations. Defaults to the value that a wrapped model has
            at the time; without one the divergence is not measured.
        divergence_options: More arguments of `keras_nrs.flatness.model_divergence`:
            `perturbation`, `num_samples`, `seed` and others.
        eigenvalue_options: More arguments of `keras_nrs.flatness.hessian_eigenvalues`:
            `variables` (defaults to `"last_layer"`), `tol`, `batch_size` and others.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:

    ```python
    monitor = keras_nrs.callbacks.FlatnessMonitor(x_val, y_val, every=5)
    history = model.fit(x, y, epochs=50, callbacks=[monitor])
    history.history["val_eigenvalue"]
    ```
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        every: int = 1,
        k: int = 1,
        eps: float | None = None,
        divergence_options: dict[str, Any] | None = None,
        eigenvalue_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # A missing extra is an error now rather than after the first epoch.
        from keras_nrs import flatness

        self._flatness = flatness
        if isinstance(x, Iterator):
            raise TypeError(
                "`x` must be arrays or a data set that can be read at every "
                f"measurement. Received: x of type {type(x).__name__}. Pass arrays, or "
                "a tf.data.Dataset, PyDataset or DataLoader."
            )
        self.every = check_int("every", every, minimum=1)
        self.k = check_int("k", k, minimum=0)
        self.eps = None if eps is None else check_nonnegative("eps", eps)
        self._divergence_options = _options(
            "divergence_options",
            divergence_options,
            inspect.signature(flatness.model_divergence).parameters,
        )
        self._eigenvalue_options = _options(
            "eigenvalue_options",
            eigenvalue_options,
            {
                **inspect.signature(flatness.hessian_eigenvalues).parameters,
                **flatness.operator.OperatorOptions.__annotations__,
            },
        )
        # As a measurement would check them, but now.
        is_arrays = check_data(x, y, None)
        is_fisher = self._eigenvalue_options.get("curvature") == "fisher"
        if self.k and is_arrays and y is None and not is_fisher:
            raise ValueError(
                "`y` must be labels where `x` is arrays, unless k=0. Received: y=None."
            )
        self._data = x, y

    def on_train_begin(self, logs: Any = None) -> None:
        """Raise what would be an error after the first epochs."""
        if not self.k:
            return
        names = self._flatness.operator.OperatorOptions.__annotations__
        given = self._eigenvalue_options
        operator = self._flatness.hessian_operator(
            self.model, *self._data, **{n: given[n] for n in names if n in given}
        )
        if self.k > operator.shape[0]:
            raise ValueError(
                "`k` must be at most the number of selected weights, "
                f"{operator.shape[0]}. Received: k={self.k}."
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None or (epoch + 1) % self.every:
            return
        x, y = self._data
        eps = self.eps
        if eps is None and hasattr(self.model, "base_model"):
            eps, _ = _values(self.model)
        if eps is not None:
            divergence = self._flatness.model_divergence(
                self.model, x, y, **{"eps": eps} | self._divergence_options
            )
            logs["val_model_divergence"] = divergence.mean
        if self.k:
            result = self._flatness.hessian_eigenvalues(
                self.model, x, y, k=self.k, **self._eigenvalue_options
            )
            values = map(float, result.eigenvalues)
            names = [f"val_eigenvalue_{i + 1}" for i in range(self.k)]
            if self.k == 1:
                names = ["val_eigenvalue"]
            logs.update(zip(names, values, strict=True))


def _options(name: str, given: Any, known: Iterable[str]) -> dict[str, Any]:
    """Options for a measurement, or an error if they cannot be."""
    known = sorted(set(known) - {"model", "x", "y", "k", "options"})
    options = {} if given is None else given
    if not isinstance(options, dict) or not set(options) <= set(known):
        raise ValueError(
            f"`{name}` must be a dict with keys among {known}. Received: "
            f"{name}={given!r}."
        )
    return options


class ProcessesAgree(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises before training if the processes of a run would wait for each other.

    Added by `NRSModel.fit()`. Every step needs all processes, so they must have the
    same number of batches and start at the same epoch.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        steps = (self.params or {}).get("steps") or 0
        epoch = self.model._initial_epoch or 0
        processes = self.model.values_of_processes([steps, epoch])
        if all(values == processes[0] for values in processes):
            return
        raise ValueError(
            "All processes must have the same number of batches in an epoch and the "
            "same initial epoch. Received: (batches, initial epoch) = "
            f"{[tuple(values) for values in processes]}, by process. Use "
            "dataset.batch(batch_size, drop_remainder=True), and keep the checkpoints "
            "of keras.callbacks.BackupAndRestore where all processes can read them."
        )


def _values(model: Any) -> tuple[float, float]:
    """eps and alpha."""
    eps, alpha = (
        float(keras.ops.convert_to_numpy(v)) for v in (model.eps, model.alpha)
    )
    return eps, alpha
