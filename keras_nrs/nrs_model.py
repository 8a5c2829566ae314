"""`NRSModel`, `wrap` and `unwrap`: what Keras sees."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any
from typing import Unpack

import keras

from keras_nrs import keras_internals
from keras_nrs import saving
from keras_nrs import stateless
from keras_nrs._checks import check_seed
from keras_nrs.backend import loop_over_batches
from keras_nrs.backend import process_index
from keras_nrs.backend import scope_of
from keras_nrs.backups import locked_backups
from keras_nrs.backups import with_atomic_backups
from keras_nrs.batches import check_not_empty
from keras_nrs.coefficients import Coefficient
from keras_nrs.coefficients import Given
from keras_nrs.fit_checks import EpsWarnings
from keras_nrs.fit_checks import ProcessesAgree
from keras_nrs.forwarding import Forwarded
from keras_nrs.forwarding import ForwardsToBase
from keras_nrs.forwarding import TensorBoardGraphs
from keras_nrs.labels import naming_labels
from keras_nrs.perturbations import Perturbation
from keras_nrs.preprocessing import with_preprocessing
from keras_nrs.step.batch_objective import BatchObjective
from keras_nrs.step.options import OPTION_NAMES
from keras_nrs.step.options import StepArguments
from keras_nrs.step.options import StepOptions
from keras_nrs.step.options import with_spelled_options
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import check_divergence
from keras_nrs.trainers import BackendTrainer

Tensor = Any

# What a model with a `train_step()` of its own needs in it.
_OWN_STEP = """\
    weights = self.trainable_variables
    deltas = keras_nrs.perturbations.RelativeBall().sample(weights, 0.2, seed)
    y_pred = self(x, training=True)
    y_pred_perturbed = ...  # The same call, with weights + deltas and the same masks.
    loss = keras_nrs.nrs_objective(y, y_pred, y_pred_perturbed, loss=self.loss).total"""


@with_spelled_options
def wrap(
    model: keras.Model,
    eps: Given | None = None,
    alpha: Given | None = None,
    *,
    divergence: Any = "auto",
    seed: int | None = None,
    **options: Unpack[StepArguments],
) -> "NRSModel":
    """Regularize a Keras model with NRS.

    Returns an `NRSModel` that shares the weights, the optimizer and the compiled
    state of `model`. A compiled model stays compiled: call `fit()` next.

    **eps decides everything.** By default delta is at most 0.2 times as long as the
    weights, on any network. Compare with the baseline on validation data, and with eps
    from 0.1 to 0.4. The paper's own setting, `eps=0.1, perturbation="ball",
    normalize=False`, perturbs so little that nothing was ever measured but a doubled
    loss; training then warns.

    Args:
        model: Any `keras.Model` that does not override `train_step()`.
        eps: Size of the neighborhood of theta, >= 0. Its unit depends on
            `perturbation`. A number, or a
            `keras.optimizers.schedules.LearningRateSchedule` of the training steps,
            which are counted from 0 and go on in a saved model or a backup. Assignable
            during training. Defaults to 0.2; with `scheme="sam"` to 0.05, and with
            `"asam"` to 0.5.
        alpha: Weight of the model divergence, >= 0, a number or a schedule like `eps`.
            Assignable during training. Defaults to 1.
        beta: Weight of the perturbed loss L(theta + delta), >= 0.
        scheme: `"nrs"` minimizes Equation 3; `"rpr"` (random perturbation) minimizes
            L(theta + delta) at the price of a plain step: its only pass, at theta +
            delta, also gives metrics and BatchNorm statistics; `"baseline"` minimizes
            L(theta). `"sam"` and `"asam"`, sharpness-aware minimization and its
            adaptive form, minimize L(theta + delta) with delta along the gradient:
            `perturbation="ascent"` and `"adaptive_ascent"`.
        perturbation: `"ball"`, `"relative"`, `"layerwise"`, `"filterwise"`,
            `"elementwise"`, `"released"`, `"ascent"`, `"adaptive_ascent"`, or an
            instance of `keras_nrs.perturbations.Perturbation`. Defaults to
            `"relative"`, but for `"sam"` and `"asam"`, which have their own.
        divergence: `"auto"` for the divergence that belongs to the compiled loss, or a
            `keras_nrs.divergences.Divergence`, or a list or dict of them, one (or
            `None`) for each output.
        interval: The perturbed pass runs at every `interval`-th step only; the
            other steps minimize L(theta), at the cost of a plain step.
        normalize: Whether to divide Equation 3, except for weight penalties, by
            `1 + beta`. A learning rate and penalties that were tuned without NRS then
            keep their meaning. The paper has the sum.
        perturbations_per_replica: Number of groups into which the batch of each device
            is split. Each has a delta of its own, at the cost of smaller batches for
            the hardware, with independent dropout masks and its own batch moments in
            BatchNorm. With 1 each device draws one delta, as in the paper.
        sync_perturbation: Whether all devices draw the same delta.
        perturbed_fraction: Share of each batch, > 0 and <= 1, that the perturbed pass
            and the divergence take. It is chosen at random at each step: an unbiased
            estimate of their means over the batch, for less time. The share and the
            rest have dropout masks and batch moments of their own.
        memory_efficient: Whether the perturbed pass runs a second time for its
            gradient, so that only the activations of one pass are kept. The gradients
            are the same.
        clean_pass: Whether `scheme="rpr"` also runs the pass at theta, for metrics,
            BatchNorm statistics and the divergence, as the paper's tables need it.
        antithetic: `True`: the deltas of groups come in pairs delta, -delta, so that
            the noise along the mean gradient cancels, at no cost. It needs an even
            number of groups on all devices together, or on each with
            `sync_perturbation`. `"same_samples"`: all samples have both deltas, for
            one pass more; the perturbed loss and the divergence are means over both.
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
    >>> model = keras_nrs.wrap(model)
    >>> x, y = keras.random.normal((8, 4)), keras.ops.arange(8) % 3
    >>> history = model.fit(x, y, batch_size=2, verbose=0)
    >>> list(history.history)
    ['loss', 'model_divergence', 'perturbed_loss']
    """
    return NRSModel(
        model, eps=eps, alpha=alpha, divergence=divergence, seed=seed, **options
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


class _ReadOnlyOption:
    """An option of `wrap()`. Compiled steps depend on it, so it cannot be assigned."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return getattr(instance.step_options, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(
            f"`{self._name}` is set by wrap() and cannot be assigned. Received: "
            f"{self._name}={value!r}. Use keras_nrs.wrap(keras_nrs.unwrap(model), "
            f"{self._name}=...). Only `eps` and `alpha` can be assigned."
        )


@dataclasses.dataclass(frozen=True)
class _Origin:
    """The base model that functions and divergences were made for.

    Attributes:
        compilation: An object for each call of its `compile()`.
        distribution: The distribution in use.
        weights: Identity and dtype of its weights, `None` before it is built.
    """

    compilation: Any = None
    distribution: Any = None
    weights: list[tuple[int, str]] | None = None

    def is_other_than(self, earlier: "_Origin") -> bool:
        # A model built inside fit() has no earlier weights to compare with.
        has_other_weights = None not in (self.weights, earlier.weights) and (
            self.weights != earlier.weights
        )
        return (
            self.compilation is not earlier.compilation
            or self.distribution is not earlier.distribution
            or has_other_weights
        )


def _preprocessed(name: str) -> Callable[..., Any]:
    """A method of `keras.Model` that first preprocesses as the base model does."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def run(self: "NRSModel", *args: Any, **kwargs: Any) -> Any:
        preprocessing = with_preprocessing(self)
        with loop_over_batches():
            if preprocessing is None:
                return method(self, *args, **kwargs)
            return getattr(preprocessing, name)(*args, **kwargs)

    return run


def _as_in_base(name: str) -> Callable[..., Any]:
    """Such a method, or the base model's if its class has one of its own."""
    run = _preprocessed(name)

    @functools.wraps(getattr(keras.Model, name))
    def run_as_in_base(self: "NRSModel", *args: Any, **kwargs: Any) -> Any:
        base = self.base_model
        is_own = getattr(type(base), name) is not getattr(keras.Model, name)
        if is_own and with_preprocessing(self) is None:
            return getattr(base, name)(*args, **kwargs)
        return run(self, *args, **kwargs)

    return run_as_in_base


@keras.saving.register_keras_serializable(package="keras_nrs")
class NRSModel(ForwardsToBase, keras.Model):  # type: ignore[misc]
    """A model that trains `base_model` with Neighborhood Region Smoothing.

    Each training step draws a random perturbation delta of the weights theta and
    minimizes

        L(theta) + alpha * d(theta, theta + delta) + beta * L(theta + delta)

    divided by `1 + beta` unless `normalize=False`, where d is the Kullback-Leibler
    divergence between the outputs of both models. Both passes see the same batch,
    dropout masks and random seeds. BatchNorm
    statistics, metrics and weight penalties come from the pass at theta alone; losses
    of `add_loss()` and activity regularizers are part of L, in both passes.
    `scheme="rpr"` has the pass at theta + delta alone: all but penalties come from it.

    Everything but training is the base model's: `compile()` compiles it, `evaluate()`
    and `predict()` give its results, and its layers, inputs and methods, and attributes
    of its own class, are read and assigned here as there.
    Training logs are `loss` (the minimized total), `model_divergence` (not multiplied
    by alpha), `perturbed_loss` and the base model's metrics. Steps that `interval`
    leaves out, and steps with `alpha = beta = 0`, perturb nothing and do not update
    the second and third.

    Make one with `keras_nrs.wrap`, which describes the arguments.

    Attributes:
        base_model: The user's own model.
        eps: `keras.Variable`, size of the neighborhood; of a schedule, that of the last
            step. Assign a number to it (`model.eps = 0.2`) at any time. Nothing is
            compiled again, unless it replaces a schedule or is one.
        alpha: `keras.Variable`, weight of the divergence. Assignable like `eps`.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Equation 3
    and Algorithm 1.

    Example:

    ```python
    model.compile("adam", loss, metrics=["accuracy"])
    nrs_model = keras_nrs.wrap(model)
    nrs_model.fit(x, y, epochs=10)
    nrs_model.save("nrs.keras")  # to continue training
    model.save("model.keras")  # your own model, without keras_nrs
    ```
    """

    base_model: keras.Model
    train_function: Any
    test_function: Any
    predict_function: Any

    optimizer = Forwarded()
    loss = Forwarded()
    compiled = Forwarded()
    run_eagerly = Forwarded()
    jit_compile = Forwarded()
    steps_per_execution = Forwarded()
    _compile_loss = Forwarded()
    _compile_metrics = Forwarded()
    _loss_tracker = Forwarded()
    _distribute_strategy = Forwarded()
    get_compile_config = Forwarded()
    compile_from_config = Forwarded()
    built = Forwarded(is_assignable=False)
    trainable = Forwarded()
    layers = Forwarded()
    get_layer = Forwarded()
    input_spec = Forwarded()
    supports_masking = Forwarded()
    compute_mask = Forwarded()
    compute_output_shape = Forwarded()
    add_weight = Forwarded()
    add_variable = Forwarded()
    add_loss = Forwarded()
    add_metric = Forwarded()
    get_weights = Forwarded()
    set_weights = Forwarded()
    count_params = Forwarded()
    get_quantization_layer_structure = Forwarded()
    metrics_names = Forwarded()
    export = Forwarded()

    @with_spelled_options
    def __init__(
        self,
        base_model: keras.Model,
        eps: Given | None = None,
        alpha: Given | None = None,
        *,
        divergence: Any = "auto",
        seed: int | None = None,
        name: str | None = None,
        **options: Unpack[StepArguments],
    ) -> None:
        _check_model(base_model)
        calibrated_for = getattr(eps, "perturbation", None)
        step_options = StepOptions.from_arguments(options)
        _check_calibration(calibrated_for, step_options.perturbation)
        if step_options.scheme in ("sam", "asam") and alpha not in (None, 1.0):
            raise ValueError(
                f"`alpha` must not be given with scheme={step_options.scheme!r}, which "
                f"has no divergence. Received: alpha={alpha!r}. Leave it out."
            )
        if seed is not None:
            seed = check_seed("seed", seed)
        divergences = ChosenDivergences(check_divergence(divergence))
        super().__init__(
            name=name or f"nrs_{base_model.name}",
            dtype=base_model.dtype_policy,
            autocast=False,
        )
        self.step_options = step_options
        self._divergences = divergences
        self._seed = seed
        with scope_of(base_model):
            eps = step_options.default_eps if eps is None else eps
            self._eps = Coefficient("eps", eps)
            self._alpha = Coefficient("alpha", 1.0 if alpha is None else alpha)
            self.seed_generator = keras.random.SeedGenerator(seed)
            names = ["model_divergence"] if step_options.has_divergence else []
            if step_options.scheme != "baseline":
                names.append("perturbed_loss")
            self._trackers = [keras.metrics.Mean(name=name) for name in names]
        self.base_model = base_model
        self._origin = _Origin()
        self._eps_warnings = EpsWarnings()
        objective = BatchObjective(base_model, step_options, self._divergences)
        self._trainer = BackendTrainer(self, objective, self._trackers)

    @property
    def eps(self) -> keras.Variable:
        return self._eps.variable

    @eps.setter
    def eps(self, value: Any) -> None:
        self._eps.assign(value)

    @property
    def alpha(self) -> keras.Variable:
        return self._alpha.variable

    @alpha.setter
    def alpha(self, value: Any) -> None:
        self._alpha.assign(value)

    @property
    def coefficients(self) -> tuple[Coefficient, Coefficient]:
        """eps and alpha."""
        return self._eps, self._alpha

    def given_coefficients(self) -> dict[str, Given]:
        """eps and alpha as they were given to `wrap()` or assigned last."""
        return {
            coefficient.name: coefficient.given for coefficient in self.coefficients
        }

    def divergence_in_use(self) -> ChosenDivergences:
        """A copy of the divergences: as given, and resolved if that is done."""
        self._follow_base_model()
        return dataclasses.replace(self._divergences)

    # The steps are the trainer's.

    def train_step(self, *args: Any) -> Any:
        return self._trainer.train_step(*args)

    def test_step(self, *args: Any) -> Any:
        return self._trainer.test_step(*args)

    def predict_step(self, *args: Any) -> Any:
        return self._trainer.predict_step(*args)

    def make_train_function(self, force: bool = False) -> None:
        self._follow_base_model()
        if self.step_options.scheme != "baseline":
            _check_layers(self.base_model)
        self.step_options.check_pairs(self._trainer.num_replicas())
        self._trainer.make_train_function(super().make_train_function, force)

    def make_test_function(self, force: bool = False) -> None:
        self._follow_base_model()
        super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> None:
        self._follow_base_model()
        super().make_predict_function(force)

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        # Keras has it on TensorFlow alone.
        batch = self._trainer.first_batch(iterator, data_batch)
        super()._maybe_symbolic_build(data_batch=batch)

    def _follow_base_model(self) -> None:
        """Forget what was made for the base model as it was before.

        It may have been compiled or moved since then, or have other weights, after
        `quantize()` or `enable_lora()`.
        """
        base = self.base_model
        origin = _Origin(
            keras_internals.last_compilation(base),
            keras.distribution.distribution(),
            [(id(v), v.dtype) for v in base.weights] if base.built else None,
        )
        if origin.is_other_than(self._origin):
            self.train_function = self.test_function = self.predict_function = None
            self._divergences.resolved = None
        self._origin = origin

    # The base model, as Keras sees it.

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if training:
            warnings.warn(
                f"The wrapped model {self.name!r} is not regularized where something "
                "other than its own fit() or train_on_batch() calls it in training. "
                "Wrap the outermost model: keras_nrs.wrap(outer). In a loop of your "
                "own use keras_nrs.nrs_objective.",
                stacklevel=2,
            )
        base = self.base_model
        return base(inputs, **stateless.call_kwargs(base, training=training))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base model, with the arguments of its `compile()`."""
        self.base_model.compile(*args, **kwargs)
        self.train_function = self.test_function = self.predict_function = None

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantize the base model, with the arguments of its `quantize()`."""
        self.base_model.quantize(*args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        with naming_labels(y, y_pred, sample_weight):
            return keras_internals.compute_loss(
                self.base_model, x, y, y_pred, sample_weight, training=training
            )

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        with naming_labels(y, y_pred, sample_weight):
            logs: dict[str, Tensor] = self.base_model.compute_metrics(
                x, y, y_pred, sample_weight
            )
        return logs

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        if not hasattr(self, "base_model"):
            return []
        return self.base_model.metrics + self._trackers

    def _flatten_metrics_in_order(self, logs: dict[str, Any]) -> Any:
        # A list is what plain Keras returns, in the order of `metrics_names`.
        own = {tracker.name for tracker in self._trackers}
        bases = {name: value for name, value in logs.items() if name not in own}
        return super()._flatten_metrics_in_order(bases)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's `summary()`, and a line with the settings of NRS."""
        summary = self.base_model.summary
        summary(*args, **kwargs)
        call = inspect.signature(summary).bind(*args, **kwargs)
        line = f" Trained with keras_nrs: {self._settings()}"
        (call.arguments.get("print_fn") or print)(line)

    def _settings(self) -> str:
        """The arguments of `wrap()` that matter, in a line."""
        options = self.step_options
        settings = options.changed()
        if options.scheme == "baseline":
            settings = {"scheme": "baseline"}
        else:
            settings |= self.given_coefficients()
        if not options.has_divergence:
            settings.pop("alpha", None)

        def shown(value: Any) -> str:
            is_plain = isinstance(value, str | int | float)
            return repr(value) if is_plain else f"{type(value).__name__}()"

        return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())

    def reset_metrics(self) -> None:
        self._eps_warnings.before_reset(self._trackers)
        super().reset_metrics()

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        call = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        arguments = dict(call.arguments)
        del arguments["self"]
        check_not_empty(arguments.get("x"))
        callbacks = arguments.get("callbacks")
        is_first = process_index(self) == 0
        in_list = getattr(callbacks, "callbacks", None)  # Of Keras's CallbackList.
        given = keras.tree.flatten(callbacks or []) if in_list is None else in_list
        own: list[Any] = [ProcessesAgree(arguments.get("x")), self._eps_warnings]
        own.append(TensorBoardGraphs(given))
        used = [*with_atomic_backups(given, is_first_process=is_first), *own]
        if in_list is None:
            callbacks = used
        else:
            for callback in own:
                callback.set_model(self)
            in_list[:] = used
        with locked_backups(used, is_first_process=is_first):
            return self._fit(**(arguments | {"callbacks": callbacks}))

    fit.__doc__ = keras.Model.fit.__doc__
    fit.__signature__ = inspect.signature(keras.Model.fit)  # type: ignore[attr-defined]

    _fit = _preprocessed("fit")
    train_on_batch = _preprocessed("train_on_batch")
    evaluate = _as_in_base("evaluate")
    predict = _as_in_base("predict")
    test_on_batch = _as_in_base("test_on_batch")
    predict_on_batch = _as_in_base("predict_on_batch")

    # Saving.

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save()`, by the first process alone if there are several.

        The file is replaced as a whole: it is never half-written.

        Raises:
            ValueError: if `filepath` is of Keras's legacy HDF5 format.
        """
        saving.check_format(filepath)
        saving.write_by_first_process(
            super().save, ".keras", filepath, overwrite, process_index(self), **kwargs
        )

    def save_weights(
        self, filepath: Any, overwrite: bool = True, **kwargs: Any
    ) -> None:
        """As `keras.Model.save_weights()`, written like a file of `save()`."""
        save, ending = super().save_weights, ".weights.h5"
        saving.write_by_first_process(
            save, ending, filepath, overwrite, process_index(self), **kwargs
        )

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.load_weights()`, also from a model that was not wrapped."""
        is_wrapped = saving.holds_wrapped_model(filepath)
        load = super().load_weights if is_wrapped else self.base_model.load_weights
        load(filepath, *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        saving.save_state(self, store)

    def load_own_variables(self, store: Any) -> None:
        saving.load_state(self, store)

    def get_config(self) -> dict[str, Any]:
        base_model = keras.saving.serialize_keras_object(self.base_model)
        base_model.pop("compile_config", None)
        divergence = keras.saving.serialize_keras_object(self._divergences.given)
        return {
            "base_model": base_model,
            **keras.saving.serialize_keras_object(self.given_coefficients()),
            **self.step_options.config(),
            "divergence": divergence,
            "seed": self._seed,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "NRSModel":
        signature = inspect.signature(cls)
        return cls(**saving.arguments_from_config(config, signature, custom_objects))


for _name in OPTION_NAMES:
    setattr(NRSModel, _name, _ReadOnlyOption(_name))


def _check_calibration(calibrated_for: Any, perturbation: Perturbation) -> None:
    if calibrated_for is not None and type(calibrated_for) is not type(perturbation):
        names = type(calibrated_for).__name__, type(perturbation).__name__
        raise ValueError(
            "`eps` must belong to the perturbation. Received: an eps that "
            f"calibrate_eps() found for a {names[0]}, and perturbation={names[1]}. "
            "Pass the same perturbation to both, or float(eps) if you mean it."
        )


def _check_layers(model: keras.Model) -> None:
    """Raise an error for weights that a forward pass reads past Keras's variables."""
    kinds = keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer
    for layer in keras_internals.sublayers(model, recursive=True):
        if isinstance(layer, kinds) and layer.trainable_variables:
            raise ValueError(
                "`model` must have layers of Keras wherever weights are trained. "
                f"Received: a model named {model.name!r} with the layer {layer.name!r} "
                f"of class {type(layer).__name__}, whose own weights cannot be "
                "perturbed. Set layer.trainable = False, rebuild it from layers of "
                "Keras, or use keras_nrs.nrs_objective in a loop of your own."
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
            "`model` must not override train_step(), which wrap() replaces. Received: "
            f"a model of class {name}. Take the loss of your own step from both "
            f"passes instead:\n\n{_OWN_STEP}\n\nhelp(keras_nrs.nrs_objective) has "
            "whole steps for each backend."
        )
    overrides_fit = type(model).fit is not keras.Model.fit
    if overrides_fit and not hasattr(model, "preprocess_samples"):
        warnings.warn(
            f"{name} overrides fit(). The wrapped model uses keras.Model.fit() "
            "instead.",
            stacklevel=4,
        )
