"""Callbacks for `NRSModel.fit()`."""

import math
import warnings
from typing import Any

import keras

from keras_nrs import perturbations

# Below this share of the loss the divergence has no measurable effect on training.
_INERT_SHARE = 1e-4
# The length of delta is random. One step alone may have drawn a short one.
_FEWEST_STEPS = 2


class InertEpsWarning(keras.callbacks.Callback):  # type: ignore[misc]
    """Warns once if eps is so small that the divergence cannot matter.

    Added by `NRSModel.fit()`. After the first epoch (the first epochs, if they are of
    one step) it compares alpha times the mean divergence with the loss. It is silent
    if `eps` or `alpha` is 0, or if one of them was assigned since training began.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        self._is_open = model.scheme == "nrs" and not model._inert_eps_reported
        self._first_values = _values(model)
        self._first_step = self._step()
        self._divergences: list[float] = []
        self._losses: list[float] = []

    def _step(self) -> int:
        state = keras.ops.convert_to_numpy(self.model.seed_generator.state)
        return int(state[1])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        is_fixed = _values(self.model) == self._first_values
        if not self._is_open or not is_fixed or 0 in self._first_values:
            return
        logs = logs or {}
        self._divergences.append(float(logs.get("model_divergence", math.nan)))
        self._losses.append(float(logs.get("loss", math.nan)))
        steps = (self._step() - self._first_step) / self.model.interval
        if steps >= _FEWEST_STEPS:
            self._is_open = False
            self._judge()

    def _judge(self) -> None:
        eps, alpha = self._first_values
        epochs = len(self._losses)
        divergence = sum(self._divergences) / epochs
        loss = sum(self._losses) / epochs
        is_inert = alpha * divergence < _INERT_SHARE * loss
        if not is_inert or not self.model.trainable_variables:
            return
        self.model._inert_eps_reported = True
        weights = [w.value for w in self.model.trainable_variables]
        norm = float(keras.ops.convert_to_numpy(perturbations.norm(weights)))
        advice = (
            "Use wrap(model, eps=0.3, perturbation='relative'), whose radius grows "
            "with that norm, or find an eps with keras_nrs.calibrate_eps(model, x, "
            "target_divergence=0.05)."
        )
        if divergence >= _INERT_SHARE * loss:
            advice = f"alpha={alpha:.3g} is too small: start with 1."
        warnings.warn(
            f"eps={eps:.3g} has no effect with perturbation "
            f"{type(self.model.perturbation).__name__}: over the first "
            f"{'epoch' if epochs == 1 else f'{epochs} epochs'} the mean model "
            f"divergence was {divergence:.2g}, and alpha * divergence is "
            f"{alpha * divergence / loss:.1g} of the loss. The norm of the weights is "
            f"{norm:.3g}. {advice}",
            stacklevel=2,
        )


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


def leave_backups_to_first_process(callbacks: Any) -> None:
    """Let the first process alone write and delete the files of `BackupAndRestore`.

    `NRSModel.save_weights()` sees to the weights, in all callbacks, by itself.
    """
    for callback in getattr(callbacks, "callbacks", callbacks):
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            callback._save_model = lambda callback=callback: (
                callback.model.save_weights(callback._weights_path)
            )
            callback.delete_checkpoint = False


def _values(model: Any) -> tuple[float, float]:
    """eps and alpha."""
    eps, alpha = (
        float(keras.ops.convert_to_numpy(v)) for v in (model.eps, model.alpha)
    )
    return eps, alpha
