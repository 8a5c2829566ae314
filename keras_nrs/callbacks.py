"""Callbacks for `NRSModel.fit()`."""

import math
import warnings
from typing import Any

import keras
import numpy as np

# Below this share of the loss the divergence has no measurable effect on training.
_INERT_SHARE = 1e-4
# The length of delta is random. One step alone may have drawn a short one.
_FEWEST_STEPS = 2


class InertEpsWarning(keras.callbacks.Callback):  # type: ignore[misc]
    """Warns once if eps is so small that the divergence cannot matter.

    Added by `NRSModel.fit()`. After the first epoch (the first epochs, if they are of
    one step) it compares alpha times the mean divergence with the loss. It is silent
    if `eps` or `alpha` is 0, or if `eps` was assigned since training began.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_open = self.model.scheme == "nrs"
        self._first_eps = _value(self.model.eps)
        self._first_step = self._step()
        self._shares: list[float] = []

    def _step(self) -> int:
        return int(self.model.seed_generator.state[1])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        eps, alpha = _value(self.model.eps), _value(self.model.alpha)
        is_fixed = eps == self._first_eps and eps > 0 and alpha > 0
        if not self._is_open or not is_fixed or self.model._inert_eps_reported:
            return
        divergence, loss = (
            float((logs or {}).get(name, math.nan))
            for name in ("model_divergence", "loss")
        )
        self._shares.append(alpha * divergence / loss if loss > 0 else math.nan)
        steps = (self._step() - self._first_step) / self.model.interval
        if steps < _FEWEST_STEPS:
            return
        self._is_open = False
        share = sum(self._shares) / len(self._shares)
        if not share < _INERT_SHARE:
            return
        self.model._inert_eps_reported = True
        weights = self.model.trainable_variables
        norm = math.hypot(
            *(np.linalg.norm(keras.ops.convert_to_numpy(w.value)) for w in weights)
        )
        warnings.warn(
            f"eps={eps:.3g} has no effect with perturbation "
            f"{type(self.model.perturbation).__name__}: over the first epoch the mean "
            f"model divergence was {divergence:.2g}, and alpha * divergence is "
            f"{share:.1g} of the loss. The norm of the weights is {norm:.3g}. Use "
            "wrap(model, eps=0.3, perturbation='relative'), whose radius grows with "
            "that norm, or find an eps with keras_nrs.calibrate_eps(model, x, "
            "target_divergence=0.05).",
            stacklevel=2,
        )


def _value(variable: keras.Variable) -> float:
    return float(keras.ops.convert_to_numpy(variable.value))
