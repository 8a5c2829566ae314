"""`NRSModel`, `wrap` and `unwrap`: what Keras sees."""

import functools
import inspect
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras

from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_fraction
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_seed
from keras_nrs._files import atomic_write
from keras_nrs.backups import with_atomic_backups
from keras_nrs.batches import check_not_empty
from keras_nrs.fit_checks import EpsWarnings
from keras_nrs.fit_checks import ProcessesAgree
from keras_nrs.labels import naming_labels
from keras_nrs.preprocessing import with_preprocessing
from keras_nrs.step.batch_objective import TrainingStep
from keras_nrs.step.objective import SCHEMES
from keras_nrs.step.output_divergences import check_divergence
from keras_nrs.trainers import BackendTrainer

Tensor = Any


def wrap(  # noqa: PLR0913
    model: keras.Model,
    eps: float = 0.1,
    alpha: float = 1.0,
    *,
    beta: float = 1.0,
    scheme: str = "nrs",
    perturbation: str | perturbations.Perturbation = "ball",
    divergence: Any = "auto",
    interval: int = 1,
    normalize: bool = False,
    perturbations_per_replica: int = 1,
    sync_perturbation: bool = False,
    perturbed_fraction: float = 1.0,
    memory_efficient: bool = False,
    seed: int | None = None,
) -> "NRSModel":
    """Regularize a Keras model with NRS.

    Returns an `NRSModel` that shares the weights, the optimizer and the compiled
    state of `model`. A compiled model stays compiled: call `fit()` next.

    **eps decides everything.** The defaults are the paper's, and with them delta is so
    small that nothing but a doubled loss was ever measured; training then warns.
    `perturbation="relative"` with eps of 0.15 to 0.5 is a better start.

    Args:
        model: Any `keras.Model` that does not override `train_step()`.
        eps: Size of the neighborhood of theta, >= 0. Its unit depends on
            `perturbation`. Assignable during training.
        alpha: Weight of the model divergence, >= 0. Assignable during training.
        beta: Weight of the perturbed loss L(theta + delta), >= 0.
        scheme: `"nrs"` minimizes Equation 3; `"rpr"` (random perturbation) minimizes
            L(theta + delta); `"baseline"` minimizes L(theta).
        perturbation: `"ball"`, `"relative"`, `"layerwise"`, `"released"`, or an
            instance of `keras_nrs.perturbations.Perturbation`.
        divergence: `"auto"` for the one that belongs to the compiled loss, or a
            `keras_nrs.divergences.Divergence`, or a list or dict of them, one (or
            `None`) for each output.
        interval: The perturbed pass runs at every `interval`-th step only; the
            other steps minimize L(theta), at the cost of a plain step.
        normalize: Whether to divide Equation 3, but for weight penalties and other
            losses of layers, by `1 + beta`, so that a learning rate and penalties
            tuned without NRS carry over.
        perturbations_per_replica: The batch of each device is split into so many
            groups, each with a delta of its own, at the cost of smaller batches
            for the hardware. Dropout masks are independent, and BatchNorm's batch
            moments are those of a group. With 1 each device draws one delta, as in
            the paper.
        sync_perturbation: Whether all devices draw the same delta.
        perturbed_fraction: The perturbed pass and the divergence take this share of
            each batch, > 0 and <= 1, chosen at random at each step: an unbiased
            estimate of their means over the batch, for less time. Dropout masks and
            BatchNorm's batch moments are those of the share and of the rest.
        memory_efficient: Whether the perturbed pass is run a second time for its
            gradient, so that the activations of only one pass are kept. The
            gradients are the same.
        seed: Seed of the perturbations, from 0 to 2**31 - 1. By default drawn from
            Python's generator, so `keras.utils.set_random_seed()` makes a run
            repeatable.

    Returns:
        An `NRSModel`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064).

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> model = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    >>> x, y = keras.random.normal((8, 4)), keras.ops.arange(8) % 3
    >>> history = model.fit(x, y, batch_size=2, verbose=0)
    >>> list(history.history)
    ['loss', 'model_divergence', 'perturbed_loss']
    """
    return NRSModel(
        model,
        eps=eps,
        alpha=alpha,
        beta=beta,
        scheme=scheme,
        perturbation=perturbation,
        divergence=divergence,
        interval=interval,
        normalize=normalize,
        perturbations_per_replica=perturbations_per_replica,
        sync_perturbation=sync_perturbation,
        perturbed_fraction=perturbed_fraction,
        memory_efficient=memory_efficient,
        seed=seed,
    )


def unwrap(model: "NRSModel") -> keras.Model:
    """The user's own model inside a wrapped one, with the same weights.

    Raises:
        TypeError: if `model` is not wrapped.

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> keras_nrs.unwrap(keras_nrs.wrap(model)) is model
    True
    """
    if not isinstance(model, NRSModel):
        raise TypeError(
            "`model` must be an NRSModel, as keras_nrs.wrap() returns it. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    return model.base_model


class _OfBaseModel:
    """An attribute that is the base model's, for reading and writing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return getattr(instance.base_model, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        # `keras.Model.__init__()` resets the state of `compile()`. That of the base
        # model stays as it is.
        if hasattr(instance, "base_model"):
            setattr(instance.base_model, self._name, value)


class _Option:
    """An argument of `wrap()`, which is part of what was compiled: for reading."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self._name not in vars(instance):
            raise AttributeError(f"`{self._name}` is not set yet.")
        return vars(instance)[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        if self._name in vars(instance):
            raise AttributeError(
                f"`{self._name}` is set by wrap() and cannot be assigned. Received: "
                f"{self._name}={value!r}. Use keras_nrs.wrap(keras_nrs.unwrap(model), "
                f"{self._name}=...). Only `eps` and `alpha` can be assigned."
            )
        vars(instance)[self._name] = value


def _preprocessed(name: str) -> Callable[..., Any]:
    """A method of `keras.Model` that first preprocesses as the base model does."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        preprocessing = with_preprocessing(self)
        with self._loop_over_batches():
            if preprocessing is None:
                return method(self, *args, **kwargs)
            return getattr(preprocessing, name)(*args, **kwargs)

    return run


@keras.saving.register_keras_serializable(package="keras_nrs")
class NRSModel(BackendTrainer, TrainingStep, keras.Model):  # type: ignore[misc]
    """A model that trains `base_model` with Neighborhood Region Smoothing.

    Each training step draws a random perturbation delta of the weights theta and
    minimizes

        L(theta) + alpha * d(theta, theta + delta) + beta * L(theta + delta)

    where d is the Kullback-Leibler divergence between the outputs of both models.
    Both passes see the same batch, dropout masks and random seeds; BatchNorm
    statistics, layer losses and metrics come from the pass at theta alone.

    Everything but training is the base model's: `compile()` compiles it,
    `evaluate()` and `predict()` give its results. For its layers and inputs ask
    `base_model` itself. Training logs are `loss` (the
    minimized total), `model_divergence` (not multiplied by alpha), `perturbed_loss`
    and the base model's metrics. On steps that `interval` leaves out, or with
    `alpha = beta = 0`, nothing is perturbed and the two are not updated.

    Args: those of `keras_nrs.wrap`, which is the way to make one.

    Attributes:
        base_model: The user's own model.
        eps: `keras.Variable`, size of the neighborhood. Assign it (`model.eps = 0.2`)
            at any time; nothing is compiled again.
        alpha: `keras.Variable`, weight of the divergence. Assignable like `eps`.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Equation 3
    and Algorithm 1.

    Example:

    ```python
    model.compile("adam", loss, metrics=["accuracy"])
    nrs_model = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    nrs_model.fit(x, y, epochs=10)
    nrs_model.save("nrs.keras")  # to continue training
    model.save("model.keras")  # your own model, without keras_nrs
    ```
    """

    base_model: keras.Model
    train_function: Any
    test_function: Any
    predict_function: Any

    beta = _Option()
    scheme = _Option()
    perturbation = _Option()
    interval = _Option()
    normalize = _Option()
    perturbations_per_replica = _Option()
    sync_perturbation = _Option()
    perturbed_fraction = _Option()
    memory_efficient = _Option()

    optimizer = _OfBaseModel()
    loss = _OfBaseModel()
    compiled = _OfBaseModel()
    run_eagerly = _OfBaseModel()
    jit_compile = _OfBaseModel()
    steps_per_execution = _OfBaseModel()
    _compile_loss = _OfBaseModel()
    _compile_metrics = _OfBaseModel()
    _loss_tracker = _OfBaseModel()
    _distribute_strategy = _OfBaseModel()

    def __init__(  # noqa: PLR0913
        self,
        base_model: keras.Model,
        eps: float = 0.1,
        alpha: float = 1.0,
        *,
        beta: float = 1.0,
        scheme: str = "nrs",
        perturbation: str | perturbations.Perturbation = "ball",
        divergence: Any = "auto",
        interval: int = 1,
        normalize: bool = False,
        perturbations_per_replica: int = 1,
        sync_perturbation: bool = False,
        perturbed_fraction: float = 1.0,
        memory_efficient: bool = False,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        _check_model(base_model)
        calibrated_for = getattr(eps, "perturbation", None)
        eps = check_nonnegative("eps", eps)
        alpha = check_nonnegative("alpha", alpha)
        super().__init__(
            name=name or f"nrs_{base_model.name}",
            dtype=base_model.dtype_policy,
            autocast=False,
        )
        self.beta = check_nonnegative("beta", beta)
        self.scheme = check_choice("scheme", scheme, SCHEMES)
        self.perturbation = perturbations.get_perturbation(perturbation)
        _check_calibration(calibrated_for, self.perturbation)
        self.interval = check_int("interval", interval, minimum=1)
        self.normalize = check_bool("normalize", normalize)
        self.perturbations_per_replica = check_int(
            "perturbations_per_replica", perturbations_per_replica, minimum=1
        )
        self.sync_perturbation = check_bool("sync_perturbation", sync_perturbation)
        self.perturbed_fraction = check_fraction(
            "perturbed_fraction", perturbed_fraction
        )
        self.memory_efficient = check_bool("memory_efficient", memory_efficient)
        if seed is not None:
            seed = check_seed("seed", seed)
        self._seed = seed
        # In namespaces, so that Keras counts neither as weights nor as layers.
        self._divergences = SimpleNamespace(
            given=check_divergence(divergence),
            resolved=None,
            made_for=(None, None),
            weights=None,
        )
        with self._scope_of(base_model):
            self._coefficients = SimpleNamespace(
                eps=_coefficient(eps, "eps"), alpha=_coefficient(alpha, "alpha")
            )
            # What was given or assigned: a schedule goes there from other values.
            self._targets = SimpleNamespace(eps=eps, alpha=alpha)
            self.seed_generator = keras.random.SeedGenerator(seed)
            self._trackers: list[keras.metrics.Metric] = []
            if scheme != "baseline":
                self._trackers = [
                    keras.metrics.Mean(name="model_divergence"),
                    keras.metrics.Mean(name="perturbed_loss"),
                ]
        # What `EpsWarnings` has seen.
        self._eps_record: Any = None
        self.base_model = base_model
        self.built = base_model.built

    @property
    def eps(self) -> keras.Variable:
        return self._coefficients.eps

    @eps.setter
    def eps(self, value: Any) -> None:
        self._targets.eps = check_nonnegative("eps", value)
        self._coefficients.eps.assign(self._targets.eps)

    @property
    def alpha(self) -> keras.Variable:
        return self._coefficients.alpha

    @alpha.setter
    def alpha(self, value: Any) -> None:
        self._targets.alpha = check_nonnegative("alpha", value)
        self._coefficients.alpha.assign(self._targets.alpha)

    # What Keras sees of the base model.

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if training:
            warnings.warn(
                f"The wrapped model {self.name!r} is called in training by something "
                "else than its own fit() or train_on_batch(), and is not regularized "
                "there. Wrap the outermost model: keras_nrs.wrap(outer). In a loop of "
                "your own use keras_nrs.nrs_objective.",
                stacklevel=2,
            )
        base = self.base_model
        return base(inputs, **stateless.call_kwargs(base, training=training))

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the summary of the base model."""
        self.base_model.summary(*args, **kwargs)

    def get_layer(self, *args: Any, **kwargs: Any) -> keras.Layer:
        """A layer of the base model."""
        return self.base_model.get_layer(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base model: the arguments are those of its `compile()`."""
        self.base_model.compile(*args, **kwargs)
        self.train_function = self.test_function = self.predict_function = None

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        with naming_labels(y, y_pred, sample_weight):
            return self.base_model._compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        logs: dict[str, Tensor] = self.base_model.compute_metrics(*args, **kwargs)
        return logs

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        if not hasattr(self, "base_model"):
            return []
        return self.base_model.metrics + self._trackers

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        call = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        arguments = dict(call.arguments)
        del arguments["self"]
        check_not_empty(arguments.get("x"))
        callbacks = arguments.get("callbacks")
        own: list[Any] = [ProcessesAgree(), EpsWarnings()]
        is_first = self.process_index() == 0
        if isinstance(callbacks, keras.callbacks.CallbackList):
            for callback in own:
                callback.set_model(self)
            callbacks.callbacks[:] = [
                *with_atomic_backups(callbacks.callbacks, is_first_process=is_first),
                *own,
            ]
        else:
            given = keras.tree.flatten(callbacks or [])
            callbacks = [*with_atomic_backups(given, is_first_process=is_first), *own]
        return self._fit(**(arguments | {"callbacks": callbacks}))

    fit.__doc__ = keras.Model.fit.__doc__
    fit.__signature__ = inspect.signature(keras.Model.fit)  # type: ignore[attr-defined]

    _fit = _preprocessed("fit")
    evaluate = _preprocessed("evaluate")
    predict = _preprocessed("predict")
    train_on_batch = _preprocessed("train_on_batch")
    test_on_batch = _preprocessed("test_on_batch")
    predict_on_batch = _preprocessed("predict_on_batch")

    def make_train_function(self, force: bool = False) -> None:
        self._follow_base_model()
        super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        self._follow_base_model()
        super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> None:
        self._follow_base_model()
        super().make_predict_function(force)

    def _follow_base_model(self) -> None:
        """Forget what was made for the base model as it was before.

        It may have been compiled or moved since then, or have other weights, after
        `quantize()` or `enable_lora()`.
        """
        base = self.base_model
        self.built = base.built
        made_for = (
            getattr(base, "_compile_config", None),
            keras.distribution.distribution(),
        )
        # Of a model that is built while it is fitted, the weights are new to nothing.
        weights = [(id(v), v.dtype) for v in base.weights] if base.built else None
        known = self._divergences
        is_same = all(a is b for a, b in zip(made_for, known.made_for, strict=True))
        has_others = None not in (weights, known.weights) and weights != known.weights
        if not is_same or has_others:
            self.train_function = self.test_function = self.predict_function = None
            known.made_for, known.resolved = made_for, None
        known.weights = weights

    # Saving.

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save()`, by the first process alone if there are several.

        The file is replaced as a whole: it is never half-written.

        Raises:
            ValueError: if `filepath` is of Keras's legacy HDF5 format.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "`filepath` must end in '.keras'. Received: "
                f"filepath={os.fspath(filepath)!r}, a legacy format that cannot hold a "
                "wrapped model. keras_nrs.unwrap(model).save(...) writes yours in it."
            )
        self._write(super().save, (".keras",), filepath, overwrite, **kwargs)

    def save_weights(
        self, filepath: Any, overwrite: bool = True, **kwargs: Any
    ) -> None:
        """As `keras.Model.save_weights()`, written like a file of `save()`."""
        endings = (".weights.h5",)
        self._write(super().save_weights, endings, filepath, overwrite, **kwargs)

    def _write(
        self,
        save: Callable[..., Any],
        endings: tuple[str, ...],
        filepath: Any,
        overwrite: bool,
        **kwargs: Any,
    ) -> None:
        path = pathlib.Path(filepath)
        if self.process_index() > 0:
            # Reading the variables may take all processes: the others read them too.
            with tempfile.TemporaryDirectory() as unused:
                save(pathlib.Path(unused) / path.name, overwrite=True, **kwargs)
            return
        is_one_local_file = "://" not in str(filepath) and path.name.endswith(endings)
        if not is_one_local_file or (path.exists() and not overwrite):
            save(filepath, overwrite=overwrite, **kwargs)
            return
        with atomic_write(path) as unfinished:
            save(unfinished, overwrite=True, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantize the base model: the arguments are those of its `quantize()`."""
        self.base_model.quantize(*args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the base model for inference."""
        return self.base_model.export(*args, **kwargs)

    def _saved_state(self) -> list[keras.Variable]:
        """What is needed to continue a run, but is no weight.

        Keras does not save the states of random generators. They are here, those of
        the base model included, so that a reloaded model draws the same dropout
        masks and perturbations as one that was never saved.
        """
        weights = set(map(id, self.weights))
        seeds = [v for v in self.variables if id(v) not in weights]
        return [self.eps, self.alpha, *seeds]

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(self._saved_state()):
            store[f"{i}"] = variable

    def load_own_variables(self, store: Any) -> None:
        state = self._saved_state()
        if len(store.keys()) != len(state):
            raise ValueError(
                f"The file holds {len(store.keys())} values of eps, alpha and random "
                f"states, and the model '{self.name}' has {len(state)}. Load weights "
                "into an NRSModel around the architecture that they were saved from; "
                "weights of a model that was not wrapped load into "
                "keras_nrs.unwrap(model)."
            )
        for i, variable in enumerate(state):
            variable.assign(store[f"{i}"])

    def get_config(self) -> dict[str, Any]:
        base_model = keras.saving.serialize_keras_object(self.base_model)
        base_model.pop("compile_config", None)
        given = self._divergences.given
        return {
            "base_model": base_model,
            "eps": self._targets.eps,
            "alpha": self._targets.alpha,
            "beta": self.beta,
            "scheme": self.scheme,
            "perturbation": keras.saving.serialize_keras_object(self.perturbation),
            "divergence": keras.saving.serialize_keras_object(given),
            "interval": self.interval,
            "normalize": self.normalize,
            "perturbations_per_replica": self.perturbations_per_replica,
            "sync_perturbation": self.sync_perturbation,
            "perturbed_fraction": self.perturbed_fraction,
            "memory_efficient": self.memory_efficient,
            "seed": self._seed,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "NRSModel":
        try:
            inspect.signature(cls).bind(**config)
        except TypeError as error:
            raise ValueError(
                "`config` must be what get_config() of this version of keras_nrs or of "
                f"an older one gave. Received: a config with which {error}. "
                "Load a file of a newer version with that version; "
                "keras_nrs.unwrap(model).save(...) makes one that needs none."
            ) from error
        members = {
            name: keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
            for name in ("base_model", "perturbation", "divergence")
            if name in config
        }
        return cls(**(config | members))

    def get_compile_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.base_model.get_compile_config()
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.base_model.compile_from_config(config)


def _coefficient(value: float, name: str) -> keras.Variable:
    dtype = "float64" if keras.config.floatx() == "float64" else "float32"
    return keras.Variable(
        value, dtype=dtype, trainable=False, autocast=False, name=name
    )


def _check_calibration(
    calibrated_for: Any, perturbation: perturbations.Perturbation
) -> None:
    if calibrated_for is not None and type(calibrated_for) is not type(perturbation):
        names = type(calibrated_for).__name__, type(perturbation).__name__
        raise ValueError(
            f"`eps` must be of the perturbation. Received: an eps that calibrate_eps() "
            f"found for a {names[0]}, and perturbation={names[1]}. Pass the same "
            "perturbation to both, or float(eps) if you mean it."
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    if isinstance(model, NRSModel):
        raise ValueError(
            f"`model` is wrapped already. Received: model={model.name!r}. Wrap "
            "keras_nrs.unwrap(model) to change the arguments."
        )
    name = type(model).__name__
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"`model` must not override train_step(), which wrap() replaces. Received: "
            f"a model of class {name}. Compute the loss of your own step with "
            "keras_nrs.nrs_objective instead."
        )
    overrides_fit = type(model).fit is not keras.Model.fit
    if overrides_fit and not hasattr(model, "preprocess_samples"):
        warnings.warn(
            f"{name} overrides fit(). The wrapped model uses keras.Model.fit() "
            "instead.",
            stacklevel=4,
        )
