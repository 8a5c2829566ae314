"""What the study measures of a trained model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from keras_nrs import flatness
from keras_nrs import update_batch_norm
from keras_nrs.backend import compile_function
from keras_nrs.tuning import measures
from studies.corruptions import corrupted
from studies.weight_changes import Kernels
from studies.weight_changes import quantized

Array = NDArray[Any]
# Inputs of shape `(n, ...)` and integer labels of shape `(n,)`.
Samples = tuple[Array, Array]
Outcomes = dict[str, float]

BATCH = 500
LARGEST_LOG_TEMPERATURE = 4.0
CORRUPTED_SAMPLES = NOISE_SAMPLES = 1000
ROUNDING_SAMPLES = BATCH_NORM_SAMPLES = 2000
BITS = (8, 4, 3, 2)
NOISES, NOISE_SEEDS = (0.05, 0.1, 0.2), range(5)
FLATNESS_SAMPLES, FLATNESS_BATCH, TRACE_PRODUCTS = 200, 100, 12


class Forward:
    """The logits of a model for any weights, by one compiled function.

    Args:
        model: A built model, whose variables keep their values.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._call = compile_function(
            lambda weights, state, x: model.stateless_call(
                weights, state, x, training=False
            )[0]
        )

    def logits(self, x: Array, weights: list[Array] | None = None) -> Array:
        """Logits of shape `(n, num_classes)`, float64.

        Args:
            x: Inputs of shape `(n, ...)`.
            weights: Values of the trainable variables; `None` is the model's own.
        """
        if weights is None:
            weights = [v.value for v in self._model.trainable_variables]
        weights = [ops.convert_to_tensor(w) for w in weights]
        state = [ops.convert_to_tensor(v) for v in self._model.non_trainable_variables]
        batches = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
        found = [
            ops.convert_to_numpy(self._call(weights, state, ops.convert_to_tensor(b)))
            for b in batches
        ]
        return np.concatenate(found).astype("float64")

    def accuracy(self, samples: Samples, weights: list[Array] | None = None) -> float:
        """Share of the samples that are classified correctly, in [0, 1]."""
        return accuracy(self.logits(samples[0], weights), samples[1])


def measure(
    model: keras.Model, *, train: Samples, validation: Samples, test: Samples
) -> Outcomes:
    """All outcomes of a trained model, which stays as it is.

    Args:
        model: A functional or Sequential model with logits as its output, which must
            not be wrapped.
        train: Training samples, of which some are used for curvature and moments.
        validation: Validation samples, which choose the temperature.
        test: Test samples.
    """
    # Its own losses may differ from arm to arm.
    model = keras.Model(model.inputs, model.outputs)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    forward = Forward(model)
    return (
        quality(forward, validation, test)
        | under_corruption(forward, test)
        | under_rounding(model, forward, train[0], test)
        | under_quantization(model, test)
        | under_noise(model, forward, test)
        | curvature(model, train)
    )


def quality(forward: Forward, validation: Samples, test: Samples) -> Outcomes:
    """Accuracy, loss in nats and calibration error, also at the best temperature.

    The temperature, by which logits are divided, has the lowest loss of the validation
    samples.
    """
    logits, y = forward.logits(test[0]), test[1]
    temperature = best_temperature(forward.logits(validation[0]), validation[1])
    return {
        "accuracy": accuracy(logits, y),
        "loss": loss(logits, y),
        "calibration_error": calibration_error(logits, y),
        "temperature": temperature,
        "scaled_loss": loss(logits / temperature, y),
        "scaled_calibration_error": calibration_error(logits / temperature, y),
    }


def under_corruption(forward: Forward, test: Samples) -> Outcomes:
    """Accuracies on corrupted inputs: by kind and strength, by kind, and the mean."""
    x, y = (array[:CORRUPTED_SAMPLES] for array in test)
    found: Outcomes = {}
    kinds = []
    for kind, inputs in corrupted(x).items():
        accuracies = [forward.accuracy((bad, y)) for bad in inputs]
        for strength, value in enumerate(accuracies, start=1):
            found[f"corrupted_{kind}_{strength}"] = value
        kinds.append(float(np.mean(accuracies)))
        found[f"corrupted_{kind}"] = kinds[-1]
    return found | {"corrupted": float(np.mean(kinds))}


def under_rounding(
    model: keras.Model, forward: Forward, x_train: Array, test: Samples
) -> Outcomes:
    """Accuracies with rounded kernels, one scale per filter or per tensor.

    Names that end in `_batch_norm` are of moments that were measured again, a control:
    they are there if the model has BatchNorm.
    """
    kernels, found = Kernels(model), Outcomes()
    samples = test[0][:ROUNDING_SAMPLES], test[1][:ROUNDING_SAMPLES]
    for per_filter, name in ((True, "filter"), (False, "tensor")):
        for bits in BITS:
            weights = kernels.rounded(bits, per_filter=per_filter)
            key = f"rounded_{bits}_{name}"
            found[key] = forward.accuracy(samples, weights)
            if has_batch_norm(model):
                with restored(model):
                    _assign(model.trainable_variables, weights)
                    x = x_train[:BATCH_NORM_SAMPLES]
                    update_batch_norm(model, x, batch_size=BATCH)
                    found[f"{key}_batch_norm"] = forward.accuracy(samples)
    return found


def under_quantization(model: keras.Model, test: Samples) -> Outcomes:
    """Accuracies of copies that Keras has quantized, and the share of weights it did.

    A model without layers that take it has no such outcome.
    """
    found: Outcomes = {}
    samples = test[0][:ROUNDING_SAMPLES], test[1][:ROUNDING_SAMPLES]
    for mode in ("int8", "int4"):
        copy, share = quantized(model, mode)
        if share > 0:
            found[mode] = Forward(copy).accuracy(samples)
            found[f"{mode}_share"] = share
    return found


def under_noise(model: keras.Model, forward: Forward, test: Samples) -> Outcomes:
    """Mean accuracies over draws of noise on kernels: `noise_filter_0.1`, ..."""
    kernels, found = Kernels(model), Outcomes()
    samples = test[0][:NOISE_SAMPLES], test[1][:NOISE_SAMPLES]
    for per_filter, name in ((True, "filter"), (False, "largest")):
        for share in NOISES:
            found[f"noise_{name}_{share}"] = float(
                np.mean(
                    [
                        forward.accuracy(
                            samples,
                            kernels.noisy(
                                share,
                                np.random.default_rng(seed),
                                per_filter=per_filter,
                            ),
                        )
                        for seed in NOISE_SEEDS
                    ]
                )
            )
    return found


def curvature(model: keras.Model, train: Samples) -> Outcomes:
    """Largest Hessian eigenvalues, and the trace, of the loss of training samples.

    Of the last layer's weights, and of all. The unit is nats per squared weight.
    """
    x, y = (array[:FLATNESS_SAMPLES] for array in train)
    options: dict[str, Any] = {"regularizers": False, "batch_size": FLATNESS_BATCH}
    last = flatness.hessian_eigenvalues(model, x, y, tol=1e-2, **options)
    whole = flatness.hessian_eigenvalues(
        model, x, y, tol=1e-2, variables="all", **options
    )
    trace = flatness.hessian_trace(
        model, x, y, num_products=TRACE_PRODUCTS, variables="all", **options
    )
    return {
        "last_layer_eigenvalue": float(last.eigenvalues[0]),
        "eigenvalue": float(whole.eigenvalues[0]),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
    }


def accuracy(logits: Array, labels: Array) -> float:
    """Share of correct classes in [0, 1]; logits that are not finite are wrong."""
    is_correct = (logits.argmax(axis=1) == labels) & np.isfinite(logits).all(axis=1)
    return float(is_correct.mean())


def loss(logits: Array, labels: Array) -> float:
    """Mean cross-entropy, in nats."""
    chosen = log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return float(-chosen.mean())


def calibration_error(logits: Array, labels: Array) -> float:
    """Expected calibration error in [0, 1]."""
    return measures.calibration_error(np.exp(log_softmax(logits, axis=1)), labels)


def best_temperature(logits: Array, labels: Array) -> float:
    """The number by which logits are divided for the lowest cross-entropy."""
    bound = LARGEST_LOG_TEMPERATURE
    found = minimize_scalar(
        lambda log: loss(logits * math.exp(-log), labels),
        bounds=(-bound, bound),
        method="bounded",
    )
    return math.exp(found.x)


def has_batch_norm(model: keras.Model) -> bool:
    """Whether some layer of a functional or Sequential model is a BatchNorm."""
    kinds = keras.layers.BatchNormalization
    return any(isinstance(layer, kinds) for layer in model.layers)


@contextmanager
def restored(model: keras.Model) -> Iterator[None]:
    """A context after which the variables of a model have their old values."""
    values = [ops.convert_to_numpy(v) for v in model.variables]
    try:
        yield
    finally:
        _assign(model.variables, values)


def _assign(variables: list[Any], values: list[Array]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
