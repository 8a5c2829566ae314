"""What is measured of a trained model on validation data."""

import math
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs.batches import Batches
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence

Array = NDArray[Any]

CALIBRATION_BINS = 15
CALIBRATION_ERROR = "calibration_error"


class Metric(NamedTuple):
    """The measure that decides.

    Attributes:
        name: Its name in the logs.
        sign: 1 if more is better, -1 if less is.
    """

    name: str
    sign: int

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent."""
        return self.name == CALIBRATION_ERROR or is_accuracy(self.name)

    @property
    def heading(self) -> str:
        """Its name in a table."""
        return self.name.replace("_", " ") + (" (%)" if self.is_share else "")

    @property
    def digits(self) -> int:
        """Digits after the point in a table."""
        return 2 if self.is_share else 3

    @property
    def scale(self) -> float:
        """The factor from the logs to the table."""
        return 100.0 if self.is_share else 1.0


LOSS, CALIBRATION = Metric("loss", -1), Metric(CALIBRATION_ERROR, -1)


def is_accuracy(name: str) -> bool:
    """Whether a metric of this name is an accuracy."""
    return name.endswith(("accuracy", "acc"))


def choose_metric(model: keras.Model, given: Any, *, is_classifier: bool) -> Metric:
    """The metric that a user has named, or the one that `"auto"` stands for.

    Args:
        model: A compiled model whose metrics are built.
        given: As for `tune()`.
        is_classifier: Whether the calibration error can be measured.

    Raises:
        ValueError: if `given` is not as described there.
    """
    signs = keras_internals.metric_signs(model)
    if is_classifier:
        signs[CALIBRATION_ERROR] = -1
    name, sign = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    if name == "auto":
        accuracies = list(filter(is_accuracy, signs))
        name = accuracies[0] if len(accuracies) == 1 else "loss"
    if not isinstance(name, str) or name not in signs:
        raise ValueError(
            f"`metric` must be 'auto' or one of {list(signs)}: the loss and the "
            f"metrics of compile(). Received: metric={given!r}."
        )
    known = {"max": 1, "min": -1, "": signs[name]}
    if known.get(sign, 0) == 0:
        raise ValueError(
            f"`metric` must say whether more of {name!r} is better, because the metric "
            f"does not: metric=({name!r}, 'max') or metric=({name!r}, 'min'). "
            f"Received: metric={given!r}."
        )
    return Metric(name, known[sign])


def measure(
    model: keras.Model,
    validation: dict[str, Any],
    *,
    batch_size: int,
    outputs_are: Divergence | None,
) -> dict[str, float]:
    """The compiled loss and metrics, and the calibration error of a classifier.

    Args:
        model: A trained model, which must not be wrapped.
        validation: `x`, `y` and `sample_weight`, as for `evaluate()`.
        batch_size: Samples in a batch, if `x` is arrays.
        outputs_are: The divergence that belongs to the outputs of a classifier, `None`
            for other models.
    """
    size = {"batch_size": batch_size} if validation.get("y") is not None else {}
    logs = model.evaluate(**validation, **size, return_dict=True, verbose=0)
    measured = {name: float(value) for name, value in logs.items() if is_number(value)}
    if outputs_are is not None:
        found = _predictions(
            model, Batches(model, **validation, batch_size=batch_size), outputs_are
        )
        measured[CALIBRATION_ERROR] = calibration_error(*found)
    return measured


def is_number(value: Any) -> bool:
    """Whether a log is one number; some metrics have one for each class."""
    return np.ndim(value) == 0


def calibration_error(probabilities: Array, labels: Array) -> float:
    """Expected calibration error in [0, 1], with 15 bins of equal width.

    Args:
        probabilities: Array of shape `(n, num_classes)`.
        labels: Classes, of shape `(n,)`.

    Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599), Equation 5.
    """
    confidence = probabilities.max(axis=1)
    if not np.isfinite(confidence).all():
        return math.nan
    is_correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum(confidence * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    gaps = np.bincount(bins, confidence - is_correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _predictions(
    model: keras.Model, batches: Batches, outputs_are: Divergence
) -> tuple[Array, Array]:
    """Probabilities of classes, and labels."""
    # Not compiled: each training has another model, and one pass is soon over.
    kwargs = stateless.call_kwargs(model, training=False)
    probabilities, labels = [], []
    for batch in batches:
        outputs = ops.convert_to_numpy(model(batch.x, **kwargs))
        found = _probabilities(outputs.astype("float64"), outputs_are)
        probabilities.append(found)
        labels.append(_classes(ops.convert_to_numpy(batch.y), len(found)))
    return np.concatenate(probabilities), np.concatenate(labels)


def _probabilities(outputs: Array, outputs_are: Divergence) -> Array:
    if isinstance(outputs_are, BernoulliKL):
        yes = (1 + np.tanh(outputs / 2)) / 2 if outputs_are.from_logits else outputs
        yes = yes.reshape(-1, 1)
        return np.concatenate([1 - yes, yes], axis=1)
    assert isinstance(outputs_are, CategoricalKL)
    if not outputs_are.from_logits:
        return outputs / outputs.sum(axis=1, keepdims=True)
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _classes(labels: Array, num_samples: int) -> Array:
    """Labels as classes, from one-hot labels too."""
    is_one_hot = labels.size != num_samples
    return labels.argmax(axis=-1) if is_one_hot else labels.ravel().astype(int)
