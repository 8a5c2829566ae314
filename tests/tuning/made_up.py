"""Measurements that no training made."""

from typing import Any

from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.settings import Setting

ACCURACY = Metric("accuracy", 1)
LOSS = Metric("loss", -1)


def row(accuracy: float, setting: Setting | None = None, **changes: Any) -> Any:
    """The measurements of a training that takes as many seconds as it costs."""
    cost = 1.0 if setting is None else setting.cost
    epochs = 10 if setting is None else setting.epochs(10)
    return {
        "measured": {"accuracy": accuracy, "loss": 1 - accuracy},
        "failed": False,
        "seconds": cost,
        "epochs_trained": epochs,
        "history": {},
    } | changes
