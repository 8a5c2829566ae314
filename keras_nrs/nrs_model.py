"""`NRSModel`: what Keras sees."""

import dataclasses
import inspect
import warnings
from typing import Any
from typing import Unpack

import keras

from keras_nrs import keras_internals
from keras_nrs import saving
from keras_nrs import stateless
from keras_nrs._checks import check_seed
from keras_nrs.backend import process_index
from keras_nrs.backend import scope_of
from keras_nrs.backups import locked_backups
from keras_nrs.backups import with_atomic_backups
from keras_nrs.batches import check_not_empty
from keras_nrs.coefficients import Coefficient
from keras_nrs.coefficients import Given
from keras_nrs.fit_checks import EpsWarnings
from keras_nrs.fit_checks import ProcessesAgree
from keras_nrs.fit_checks import StopTogether
from keras_nrs.forwarding import Forwarded
from keras_nrs.forwarding import ForwardsToBase
from keras_nrs.forwarding import TensorBoardGraphs
from keras_nrs.labels import naming_labels
from keras_nrs.model_checks import check_calibration
from keras_nrs.model_checks import check_layers
from keras_nrs.model_checks import check_model
from keras_nrs.preprocessing import as_in_base
from keras_nrs.preprocessing import preprocessed
from keras_nrs.step.batch_objective import BatchObjective
from keras_nrs.step.options import OPTION_NAMES
from keras_nrs.step.options import StepArguments
from keras_nrs.step.options import StepOptions
from keras_nrs.step.options import with_spelled_options
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import check_divergence
from keras_nrs.trainers import BackendTrainer

Tensor = Any


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
    `scheme="rpr"` has the pass at theta + delta alone: all but weight penalties comes
    from it.

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
        check_model(base_model)
        calibrated_for = getattr(eps, "perturbation", None)
        step_options = StepOptions.from_arguments(options)
        check_calibration(calibrated_for, step_options.perturbation)
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
        self._is_fitting = False
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
            check_layers(self.base_model)
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

    def _get_metrics_result_or_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        # An `evaluate()` outside of `fit()` may be of one process alone.
        joined = self._trainer.joined_metrics() if self._is_fitting else None
        if joined is None:
            results: dict[str, Any] = super()._get_metrics_result_or_logs(logs)
            return results
        with joined:
            return logs | {
                k: v for k, v in self.get_metrics_result().items() if k in logs
            }

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
        # The last one sees what all others have decided.
        own += [TensorBoardGraphs(given), StopTogether()]
        used = [*with_atomic_backups(given, is_first_process=is_first), *own]
        if in_list is None:
            callbacks = used
        else:
            for callback in own:
                callback.set_model(self)
            in_list[:] = used
        self._is_fitting = True
        try:
            with locked_backups(used, is_first_process=is_first):
                return self._fit(**(arguments | {"callbacks": callbacks}))
        finally:  # Also after an interrupt.
            self._is_fitting = self._eps.is_paused = False

    fit.__doc__ = keras.Model.fit.__doc__
    fit.__signature__ = inspect.signature(keras.Model.fit)  # type: ignore[attr-defined]

    _fit = preprocessed("fit")
    train_on_batch = preprocessed("train_on_batch")
    evaluate = as_in_base("evaluate")
    predict = as_in_base("predict")
    test_on_batch = as_in_base("test_on_batch")
    predict_on_batch = as_in_base("predict_on_batch")

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
