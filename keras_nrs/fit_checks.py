"""Callbacks that `NRSModel.fit()` adds by itself."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_nrs import perturbations
from keras_nrs._checks import check_nonnegative
from keras_nrs.backend import values_of_processes
from keras_nrs.keras_internals import initial_epoch
from keras_nrs.stateless import as_float

# Below this share of the loss the divergence has no measurable effect on training.
_INERT_SHARE = 1e-4
# Perturbations whose eps is a share of the weights' norm, and an eps that is enough.
_RELATIVE = (
    perturbations.RelativeBall,
    perturbations.LayerwiseBall,
    perturbations.FilterwiseBall,
    perturbations.ElementwiseNoise,
)
_ENOUGH_EPS = 0.1
# Growth of the divergence from epoch to epoch that is not by chance.
_GROWTH = 1.1
# Processes exchange integers of 32 bits.
_LARGEST_SIZE = 2**31 - 1
# The terms of the objective that are in the logs.
_TERMS = ("loss", "perturbed_loss", "model_divergence")
# The length of delta is random. One step alone may have drawn a short one.
_FEWEST_STEPS = 2
# The outputs of a new model are uniform, and change little until it has learned.
_ENOUGH_STEPS = 100


@dataclass
class _EpsRecord:
    """Findings of the epochs with one pair of eps and alpha.

    Attributes:
        given: eps and alpha, or the schedules that give them.
        values: eps and alpha; of schedules the largest at the end of an epoch.
        is_open: Whether the divergence was never large enough to matter.
        steps: Number of steps with a perturbed pass.
        num_epochs: Number of epochs.
        divergence: Largest mean divergence of an epoch.
        grows: Whether it is the last epoch's.
        loss: Mean loss of the first epoch.
    """

    given: tuple[Any, Any]
    values: tuple[float, float]
    is_open: bool
    steps: float = 0.0
    num_epochs: int = 0
    divergence: float = 0.0
    grows: bool = False
    loss: float = math.nan

    @property
    def has_schedule(self) -> bool:
        return any(map(callable, self.given))


class EpsWarnings(keras.callbacks.Callback):  # type: ignore[misc]
    """Warns if eps is too small for the divergence to matter, or too large.

    An `NRSModel` has one for all calls of `fit()`, so that a later call goes on from
    an earlier one. It compares alpha times the mean divergence of each epoch with the
    loss of the first epoch, since later losses may be next to nothing. It warns if the
    product never was large enough: after 100 steps and the end of their epoch, or at
    the end of a shorter training. A relative eps of at least 0.1 is given 100 steps and
    as long as the divergence grows: the outputs of a new head are uniform at first. It
    is silent if `eps` or `alpha` is 0, or if one of them was assigned since training
    began. With schedules it compares the largest values, at the end of training. It
    warns of a relative eps above 1, with which delta may be longer than the weights.

    Before each epoch it raises an error if eps or alpha has a value that `wrap()` would
    refuse. After each epoch it warns once of terms in the logs that are not finite. The
    logs are at hand without waiting for a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._record = _EpsRecord((0.0, 0.0), (0.0, 0.0), is_open=False)
        self._is_in_epoch = False
        self._divergence = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # `model.eps.assign()` of Keras's variable checks nothing.
        eps, alpha = eps_and_alpha(self.model)
        check_nonnegative("eps", eps)
        check_nonnegative("alpha", alpha)
        self._is_in_epoch = True
        self._divergence = 0.0

    def before_reset(self, trackers: Sequence[keras.metrics.Metric]) -> None:
        """Note the mean divergence before a callback's `evaluate()` resets it."""
        if self._is_in_epoch and trackers:
            divergence = as_float(trackers[0].result())
            self._divergence = max(self._divergence, divergence)

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        self._are_finite = True
        self._first_step = self._last_step = self._step()
        given = _given(model)
        if self._record.given != given:
            matters = model.scheme == "nrs" and 0 not in given
            self._record = _EpsRecord(given, eps_and_alpha(model), is_open=matters)
        self._was_too_large = False
        self._warn_if_too_large()

    def _warn_if_too_large(self) -> None:
        model = self.model
        eps, _ = eps_and_alpha(model)
        kind = type(model.perturbation)
        if self._was_too_large or kind not in _RELATIVE or eps <= 1:
            return
        self._was_too_large = True
        if model.scheme != "baseline":
            _warn(
                f"eps={eps:.3g} is too large for perturbation {kind.__name__}: "
                "delta may be longer than the weights. Above 0.5 training can diverge; "
                "start with 0.1 to 0.4."
            )

    def _step(self) -> int:
        state = keras.ops.convert_to_numpy(self.model.seed_generator.state)
        return int(state[1])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = logs or {}
        self._is_in_epoch = False
        faults = {name: float(logs[name]) for name in _TERMS if name in logs}
        faults = {name: v for name, v in faults.items() if not math.isfinite(v)}
        if faults and self._are_finite:
            self._warn_of_faults(epoch, faults)
        self._are_finite = self._are_finite and not faults
        steps = (self._step() - self._last_step) / self.model.interval
        self._last_step = self._step()
        record = self._record
        # An epoch of a warm-up says nothing about the values that it leads to.
        if _given(self.model) != record.given:
            return
        if record.has_schedule:
            self._warn_if_too_large()
        if not record.is_open:
            return
        if record.num_epochs == 0:
            record.loss = float(logs.get("loss", math.nan))
        record.num_epochs += 1
        record.steps += steps
        divergence = max(self._divergence, float(logs.get("model_divergence", 0.0)))
        record.grows = divergence > _GROWTH * record.divergence
        record.divergence = max(record.divergence, divergence)
        eps, alpha = map(max, record.values, eps_and_alpha(self.model))
        record.values = eps, alpha
        record.is_open = alpha * record.divergence < _INERT_SHARE * record.loss
        # A schedule may still lead to larger values.
        if not record.has_schedule:
            self._warn_if_inert(_ENOUGH_STEPS)

    def on_train_end(self, logs: Any = None) -> None:
        has_schedule = self._record.has_schedule
        self._warn_if_inert(_ENOUGH_STEPS if has_schedule else _FEWEST_STEPS)

    def _warn_if_inert(self, fewest_steps: float) -> None:
        record = self._record
        eps, _ = record.values
        if (
            eps >= _ENOUGH_EPS
            and isinstance(self.model.perturbation, _RELATIVE)
            and record.divergence < _INERT_SHARE * record.loss
        ):
            fewest_steps = math.inf if record.grows else _ENOUGH_STEPS
        if record.is_open and 0 not in record.values and record.steps >= fewest_steps:
            self._warn_of_inert_eps()

    def _warn_of_faults(self, epoch: int, faults: dict[str, float]) -> None:
        weights = map(keras.ops.convert_to_numpy, self.model.trainable_variables)
        are_finite = all(np.isfinite(w.astype("float32")).all() for w in weights)
        steps = ""
        if self.model.scheme != "baseline":
            steps = f", up to step {self._step() - self._first_step} of fit()"
        eps, alpha = eps_and_alpha(self.model)
        advice = "Look for NaN in the data, and lower the learning rate."
        if set(faults) != {"loss"}:
            advice = (
                f"If the perturbed pass is the cause, eps={eps:.3g} is too large: with "
                "perturbation='relative' take 0.2 or less, or see "
                "keras_nrs.calibrate_eps; otherwise look for NaN in the data, and "
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
        record = self._record
        record.is_open = False
        if not self.model.trainable_variables:
            return
        eps, alpha = record.values
        weights = [w.value for w in self.model.trainable_variables]
        norm = as_float(perturbations.norm(weights))
        calibrate = (
            "find an eps with keras_nrs.calibrate_eps(model, x, target_divergence=0.02)"
        )
        advice = (
            "Use the default, wrap(model, perturbation='relative'), whose radius grows "
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
    """Warn at the line of the user's `fit()`, which is far up from a callback."""
    packages = tuple(
        os.path.dirname(file) + os.sep for file in (keras.__file__, __file__)
    )
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(packages):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class ProcessesAgree(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises before training if the processes of a run would wait for each other.

    Every step needs all processes, so they must have the same number of batches and
    start at the same epoch.

    Args:
        data: What `fit()` got as `x`. Keras does not know how many batches it has once
            it has divided a data set among processes.
    """

    def __init__(self, data: Any = None) -> None:
        super().__init__()
        self._size = _size(data)

    def on_train_begin(self, logs: Any = None) -> None:
        steps = (self.params or {}).get("steps") or self._size
        processes = values_of_processes([steps, initial_epoch(self.model)])
        if all(values == processes[0] for values in processes):
            return
        raise ValueError(
            "All processes must have the same number of batches in an epoch and the "
            "same initial epoch. Received: (batches, initial epoch) = "
            f"{[tuple(values) for values in processes]}, by process. Use "
            "dataset.batch(batch_size, drop_remainder=True), and keep the checkpoints "
            "of keras.callbacks.BackupAndRestore where all processes can read them."
        )


class StopTogether(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends training in all processes after the epoch in which one of them ends it.

    Every step needs all processes. Logs of an epoch are those of all samples, but a
    callback may be given to one process alone, or read a clock or what else is its own;
    and on PyTorch the logs of a batch are those of one process. So `stop_training`
    within an epoch waits for its end, where the processes agree. That costs one number
    an epoch.
    """

    # Keras's name. Callbacks that may stop a training within an epoch have no such
    # attribute, and Keras then calls this one after them.
    async_safe = True

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_due = False
        self._has_others = len(values_of_processes([0], self.model)) > 1
        # On JAX each read of `self.model` gives it the state of the step.
        self._trained = self.model

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._has_others and self._trained.stop_training:
            self._is_due, self._trained.stop_training = True, False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._has_others:
            own = self._is_due or bool(self.model.stop_training)
            wishes = values_of_processes([own], self.model)
            self.model.stop_training = any(wish for (wish,) in wishes)


def _given(model: Any) -> tuple[Any, Any]:
    """eps and alpha, or the schedules that give them."""
    eps, alpha = (
        given if callable(given) else value
        for given, value in zip(
            model.given_coefficients().values(), eps_and_alpha(model), strict=True
        )
    )
    return eps, alpha


def _size(data: Any) -> int:
    """The number of batches, or of samples, of data that know it; 0 of others."""
    try:
        size = int(data.cardinality()) if hasattr(data, "cardinality") else len(data)
    except (TypeError, ValueError, NotImplementedError):
        return 0
    return min(max(size, 0), _LARGEST_SIZE)


def eps_and_alpha(model: Any) -> tuple[float, float]:
    """The current eps and alpha of an `NRSModel`."""
    return as_float(model.eps), as_float(model.alpha)
