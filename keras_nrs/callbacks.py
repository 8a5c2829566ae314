"""Callbacks for `fit()`."""

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras

from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs.batches import check_data
from keras_nrs.fit_checks import eps_and_alpha
from keras_nrs.nrs_model import NRSModel


class NRSSchedule(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets eps and alpha of an `NRSModel` at the beginning of each epoch.

    Before `start_epoch` both are 0, and steps are plain ones: they cost as much, and
    minimize L(theta). Then both grow linearly over `warmup_epochs` to their full
    values, starting with `1 / warmup_epochs` of them. The logs of an epoch hold its
    values as `eps` and `alpha`, and 0 for terms of passes that it does not have. A
    value depends on the epoch alone, so training may stop and go on at any epoch
    (`initial_epoch`, a backup, a saved model).

    For values that change from step to step give a `LearningRateSchedule` to `wrap()`
    instead. A model has one or the other.

    Args:
        eps: A number >= 0, or a function that returns it for an epoch, counted from 0.
            Warm-up multiplies it. Defaults to the last value that `wrap()` got or that
            was assigned (`model.eps = 0.2`), which is restored at the end of training.
        alpha: As `eps`.
        start_epoch: First epoch with a perturbation, >= 0.
        warmup_epochs: Number of epochs, >= 0, until the full value is reached.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model is not
            wrapped or has a schedule already.

    Example:

    ```python
    model = keras_nrs.wrap(model)
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
        if not isinstance(model, NRSModel):
            raise TypeError(
                "NRSSchedule needs an NRSModel. Received: a "
                f"{type(model).__name__}. Wrap it: keras_nrs.wrap(model)."
            )
        for name, given in model.given_coefficients().items():
            if callable(given):
                raise ValueError(
                    f"NRSSchedule sets eps and alpha, and `{name}` of the model has a "
                    f"schedule already. Received: {name}={given!r}. Leave out the "
                    f"callback, or give wrap() a number: model.{name} = 0.3"
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        since_start = epoch - self.start_epoch
        eps, _ = self.model.coefficients
        eps.is_paused = since_start < 0
        factor = min(1.0, (since_start + 1) / max(1, self.warmup_epochs))
        for name, given in self._given.items():
            value = self.model.given_coefficients()[name] if given is None else given
            value = check_nonnegative(name, value(epoch) if callable(value) else value)
            value = value * factor if since_start >= 0 else 0.0
            getattr(self.model, name).assign(value)

    def on_train_end(self, logs: Any = None) -> None:
        for name, value in self.model.given_coefficients().items():
            if self._given[name] is None:
                getattr(self.model, name).assign(value)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["eps"], logs["alpha"] = eps_and_alpha(self.model)


class FlatnessMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures flatness during training, on held-out or other data.

    After every `every`-th epoch it measures, in inference mode, and adds to the logs

    - `val_model_divergence`: the mean model divergence, if `eps` is given or the model
      is wrapped and its perturbations are random (those of SAM are not);
    - `val_eigenvalue`, or `val_eigenvalue_1` to `val_eigenvalue_k`: the largest
      eigenvalues of the Hessian.

    Like validation logs, these are in the history, the progress bar and TensorBoard at
    the epochs of a measurement. Put this callback before callbacks that read logs, such
    as `TensorBoard`, `CSVLogger` or `ModelCheckpoint`. A callback that monitors one of
    the logs, such as `EarlyStopping`, needs `mode="min"`. The model need not be
    wrapped. Needs `keras-nrs[flatness]`.

    Args:
        x: Inputs, or batches of inputs and labels, as in `hessian_operator`, but no
            generator, which runs only once.
        y: Labels, if `x` is arrays.
        every: Number of epochs between measurements, >= 1.
        k: Number of eigenvalues, >= 0.
        eps: Size of the perturbations. Defaults to the current eps of a wrapped model.
            The divergence of other models is only measured if `eps` is given.
        divergence_options: More arguments of `keras_nrs.flatness.model_divergence`:
            `perturbation`, `num_samples`, `seed` and others.
        eigenvalue_options: More arguments of `keras_nrs.flatness.hessian_eigenvalues`:
            `variables` (defaults to `"last_layer"`), `tol`, `batch_size` and others,
            but no `checkpoint`: the weights change between measurements.

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
        # Imported here, so that a missing extra is an error before training.
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
        self._divergence_options = _check_options(
            "divergence_options",
            divergence_options,
            inspect.signature(flatness.model_divergence).parameters,
        )
        self._eigenvalue_options = _check_options(
            "eigenvalue_options",
            eigenvalue_options,
            {
                **inspect.signature(flatness.hessian_eigenvalues).parameters,
                **flatness.operator.OperatorOptions.__annotations__,
            },
        )
        # A measurement checks this as well, but only after the first epochs.
        names = flatness.operator.OperatorOptions.__annotations__.keys()
        flatness.eigenvalues.check_eigenvalue_options(
            max(1, self.k),
            **{n: v for n, v in self._eigenvalue_options.items() if n not in names},
        )
        is_arrays = check_data(x, y, None)
        is_fisher = self._eigenvalue_options.get("curvature") == "fisher"
        if self.k and is_arrays and y is None and not is_fisher:
            raise ValueError(
                "`y` must be labels if `x` is arrays, unless k=0. Received: y=None."
            )
        self._data = x, y

    def on_train_begin(self, logs: Any = None) -> None:
        """Raise errors that a measurement would raise after the first epochs."""
        # TensorFlow builds a subclassed model in its first step.
        if self.model.built:
            self._divergence(**{"steps": 1} | self._divergence_options)
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
        divergence = self._divergence(**self._divergence_options)
        if divergence is not None:
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

    def _divergence(self, **options: Any) -> Any:
        """The divergence, `None` if it is not to be measured."""
        x, y = self._data
        eps = options.pop("eps", self._eps_in_use())
        if eps is None:
            return None
        return self._flatness.model_divergence(self.model, x, y, eps=eps, **options)

    def _eps_in_use(self) -> float | None:
        """The size of perturbations, `None` if no divergence is measured."""
        if self.eps is not None or not isinstance(self.model, NRSModel):
            return self.eps
        perturbation = self.model.perturbation
        if perturbation.needs_gradients:
            perturbation = self._divergence_options.get("perturbation")
        return None if perturbation is None else eps_and_alpha(self.model)[0]


class WeightRecorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the trainable weights in memory while a model trains.

    `keras_nrs.flatness.trajectory(model, recorder.weights)` shows their way. It keeps
    the weights before the first epoch, and after every `every`-th one. Training again
    adds to them. For large models let Keras's `ModelCheckpoint` write files instead.

    Args:
        every: Number of epochs between two copies, >= 1.

    Attributes:
        weights: A list with a list of arrays, one for each trainable variable of the
            model (of the base model, if it is wrapped), for each copy.

    Raises:
        TypeError, ValueError: if `every` is not as described.

    Example:

    ```python
    recorder = keras_nrs.callbacks.WeightRecorder()
    model.fit(x, y, epochs=50, callbacks=[recorder])
    keras_nrs.flatness.trajectory(model, recorder.weights)
    ```
    """

    def __init__(self, *, every: int = 1) -> None:
        super().__init__()
        self.every = check_int("every", every, minimum=1)
        self.weights: list[list[Any]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        # A model that is built in `fit()` has no weights yet.
        if not self.weights and self._variables():
            self._keep()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch + 1) % self.every == 0:
            self._keep()

    def _variables(self) -> list[keras.Variable]:
        model: Any = self.model
        if isinstance(model, NRSModel):
            model = model.base_model
        variables: list[keras.Variable] = model.trainable_variables
        return variables

    def _keep(self) -> None:
        arrays = map(keras.ops.convert_to_numpy, self._variables())
        # PyTorch's arrays share the memory of the weights.
        self.weights.append([array.copy() for array in arrays])


def _check_options(name: str, value: Any, arguments: Iterable[str]) -> dict[str, Any]:
    """The options for a measurement, or an error if it has no such arguments."""
    # A checkpoint is of one measurement, and these are many.
    own = {"model", "x", "y", "k", "options", "checkpoint"}
    allowed = sorted(set(arguments) - own)
    options = {} if value is None else value
    if not isinstance(options, dict) or not set(options) <= set(allowed):
        raise ValueError(
            f"`{name}` must be a dict with keys among {allowed}. Received: "
            f"{name}={value!r}."
        )
    return options
