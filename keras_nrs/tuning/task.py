"""What is trained: a model's factory, data and the arguments of `fit()`, checked."""

import copy
import gc
import inspect
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_nrs import keras_internals
from keras_nrs import stateless
from keras_nrs._checks import check_int
from keras_nrs.batches import Batch
from keras_nrs.batches import Batches
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence
from keras_nrs.nrs_model import NRSModel
from keras_nrs.step.output_divergences import for_model
from keras_nrs.tuning.arguments import as_tuple
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.measures import choose_metric
from keras_nrs.tuning.measures import is_number
from keras_nrs.tuning.measures import measure
from keras_nrs.tuning.settings import Setting

Row = dict[str, Any]
MakeModel = Callable[..., keras.Model]


class StopIfNotFinite(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a training after an epoch whose loss is not finite."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self.model.stop_training = True


class Task:
    """A model, data, and how they are trained: all that settings share.

    Args:
        make_model: As for `tune()`.
        data: `x`, `y` and `sample_weight` for training; `x` alone is a data set.
        validation: Likewise for validation.
        fit: Further arguments of `fit()`, as `check_fit()` returns them.
        metric: As for `tune()`.

    Attributes:
        epochs: Number of epochs of a plain training.
        metric: The metric that decides.
        first: A model and a batch of validation data that it was built for.

    Raises:
        TypeError, ValueError: if `make_model` or `metric` is not as described.
    """

    def __init__(
        self,
        make_model: MakeModel,
        data: Row,
        validation: Row,
        fit: Row,
        metric: Any = "auto",
    ) -> None:
        if not callable(make_model) or isinstance(make_model, keras.Model):
            raise TypeError(
                "`make_model` must be a function that returns a new compiled model. "
                f"Received: make_model={make_model!r} of type "
                f"{type(make_model).__name__}. For example: lambda: build(), not "
                "build()."
            )
        self._make_model, self._fit = make_model, fit
        self.data, self.validation = data, validation
        self.epochs: int = fit["epochs"]
        # A data set has batches of its own.
        size = fit.get("validation_batch_size") or fit.get("batch_size") or 32
        self._batch_size = check_int("fit['batch_size']", size, minimum=1)
        model, other = (self.make_model(0, self.epochs) for _ in range(2))
        _check_models(model, other)
        batch = next(iter(Batches(model, **validation, batch_size=self._batch_size)))
        keras_internals.build_for_batch(model, tuple(batch))
        self.first = model, batch
        self._outputs_are = _classes_of(model, batch)
        is_classifier = self._outputs_are is not None
        self.metric: Metric = choose_metric(model, metric, is_classifier=is_classifier)

    @property
    def takes_epochs(self) -> bool:
        """Whether the factory is told the number of epochs."""
        return takes_epochs(self._make_model)

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate has a schedule."""
        optimizer = self.first[0].optimizer
        # That of mixed precision has the user's inside.
        config = getattr(optimizer, "inner_optimizer", optimizer).get_config()
        return isinstance(config.get("learning_rate"), dict)

    def described_fit(self) -> Row:
        """The arguments of `fit()`, with the callbacks of a training."""
        return self._fit | {"callbacks": self._callbacks()}

    def make_model(self, seed: int, epochs: int) -> keras.Model:
        """A new model, with the initial weights of a seed."""
        keras.utils.set_random_seed(seed)
        return call_factory(self._make_model, epochs)

    def check_setting(self, setting: Setting) -> None:
        """Raise an error if a setting cannot train the model."""
        model, batch = self.first
        try:
            setting.applied_to(model, seed=0)
            if setting.needs_auto_divergence:
                for_model(model, "auto", _outputs(model, batch), batch.y)
        except Exception as error:
            error.add_note(f"It is the setting {setting.name!r} of `settings`.")
            raise

    def train(self, setting: Setting, seed: int) -> tuple[Row, keras.Model]:
        """Train a new model, and measure it.

        Equal seeds give equal initial weights, and the same order of the data where
        the backend draws it by itself.

        Returns:
            The measurements, and the model, which is not wrapped.
        """
        # A model refers to itself, so those of earlier trainings may still be there.
        gc.collect()
        started = time.perf_counter()
        epochs = setting.epochs(self.epochs)
        model = self.make_model(seed, epochs)
        trained = setting.applied_to(model, seed)
        given = self._callbacks()
        arguments = self.data | self._fit | {"epochs": epochs, "verbose": 0}
        arguments["callbacks"] = [*given, StopIfNotFinite()]
        if "y" not in self.data and not isinstance(
            self.data["x"], keras.utils.PyDataset
        ):
            # Keras warns that it leaves the order to a data set.
            arguments.setdefault("shuffle", False)
        if given or "validation_freq" in self._fit:
            arguments["validation_data"] = as_tuple(self.validation)
        # What wrapping and building have drawn must not change the order of the data.
        keras.utils.set_random_seed(seed)
        with warnings.catch_warnings():
            # The table shows which eps is too small, too large, or makes NaN.
            warnings.filterwarnings("ignore", message="eps=|In epoch .* mean")
            history = trained.fit(**arguments).history
        measured = measure(
            model,
            self.validation,
            batch_size=self._batch_size,
            outputs_are=self._outputs_are,
        )
        # The last loss too: StopIfNotFinite may have left finite weights.
        decisive = measured["loss"], measured[self.metric.name], history["loss"][-1]
        row = {
            "measured": measured,
            "failed": not all(map(math.isfinite, decisive)),
            "epochs_trained": len(history["loss"]),
            "history": {
                name: [float(value) for value in values]
                for name, values in history.items()
                if is_number(values[0])
            },
            "seconds": time.perf_counter() - started,
        }
        return row, model

    def built_model(self, epochs: int) -> keras.Model:
        """A new model that weights can be loaded into."""
        model = self.make_model(0, epochs)
        keras_internals.build_for_batch(model, tuple(self.first[1]))
        return model

    def _callbacks(self) -> list[Any]:
        """New callbacks: those of another training have its state."""
        given = self._fit.get("callbacks")
        if callable(given):
            return keras.tree.flatten(given() or [])
        try:
            return copy.deepcopy(keras.tree.flatten(given or []))
        except Exception as error:  # Of a callback of the user's own.
            raise TypeError(
                "`fit` must have callbacks that can be copied for each training, or a "
                f"function that returns new ones. Received: callbacks={given!r}. "
                f"{error}"
            ) from error


def takes_epochs(make_model: MakeModel) -> bool:
    """Whether a factory has a parameter `epochs`."""
    return "epochs" in inspect.signature(make_model).parameters


def call_factory(make_model: MakeModel, epochs: int) -> keras.Model:
    """A model of a factory, for a number of epochs."""
    return make_model(epochs=epochs) if takes_epochs(make_model) else make_model()


def _check_models(model: Any, other: Any) -> None:
    """Raise an error unless these are two new compiled models."""
    if not isinstance(model, keras.Model) or isinstance(model, NRSModel):
        raise TypeError(
            "`make_model` must return a keras.Model that is not wrapped: tune() wraps "
            f"it. Received: {type(model).__name__}."
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`make_model` must return a compiled model. Received: a model without "
            "compile(). Call model.compile(optimizer, loss) in it."
        )
    if model.optimizer is other.optimizer or _parts(model) & _parts(other):
        raise ValueError(
            "`make_model` must return a new model with new weights, and a new "
            "optimizer at each call. Received: two models that share some of it. Make "
            "all of it inside the function."
        )


def _parts(model: keras.Model) -> set[int]:
    """Identities of what a training changes. Shared frozen layers do no harm."""
    layers = keras_internals.sublayers(model, recursive=True)
    unbuilt = [layer for layer in layers if not layer.built]
    return set(map(id, [model, *unbuilt, *model.trainable_variables]))


def _outputs(model: keras.Model, batch: Batch) -> Any:
    return model(batch.x, **stateless.call_kwargs(model, training=False))


def _classes_of(model: keras.Model, batch: Batch) -> Divergence | None:
    """How classes are read from the outputs, `None` for other models."""
    outputs = _outputs(model, batch)
    try:
        found = for_model(model, "auto", outputs, batch.y)
    except ValueError:
        return None
    shape: Any = getattr(outputs, "shape", ())
    if len(found) != 1 or len(shape) != 2 or batch.y is None:
        return None
    divergence = found[0].divergence
    is_binary = isinstance(divergence, BernoulliKL) and shape[1] == 1
    return divergence if is_binary or isinstance(divergence, CategoricalKL) else None
