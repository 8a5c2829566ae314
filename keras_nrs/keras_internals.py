"""Every private name of Keras that this package uses, each with why.

No other module imports `keras.src` or reads an underscored attribute of Keras's
objects. A function that works on one backend has the backend's name in its own.

Tried with Keras 3.15.0 and 3.15.1. `tests/test_keras_internals.py` fails by name when
a later version lacks one.
"""

import contextvars
import importlib
import math
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any

import keras

# Layers make masks and losses read them; nothing public does either on a tensor.
from keras.src.backend.common.masking import get_keras_mask as get_keras_mask
from keras.src.backend.common.masking import set_keras_mask as set_keras_mask
from keras.src.backend.common.stateless_scope import (
    get_stateless_scope as get_stateless_scope,
)

# A loss function as compile() wraps it; keras.losses.get() leaves it bare.
from keras.src.losses.losses import LossFunctionWrapper as LossFunctionWrapper

# The class of functional models: keras.Model is also that of subclassed ones.
from keras.src.models.functional import Functional as Functional

# How fit() reads all kinds of data; only whole methods of keras.Model do so publicly.
from keras.src.trainers.data_adapters import get_data_adapter as get_data_adapter

Tensor = Any
# From the data of a batch, its layouts, and Keras's own function of these two.
PlaceBatch = Callable[[Any, Any, Callable[[Any, Any], Any]], Any]


def compiled_loss(model: Any) -> Any:
    """The `CompileLoss` of a model, `None` without a loss.

    `model.loss` is what the user passed: it has no weights, metrics or `built`.
    """
    return model._compile_loss


def flat_losses(model: Any, outputs: Any) -> list[Any] | None:
    """A (path, loss, weight, name) for each loss of a model, `None` without a loss.

    `compile()` takes losses in many structures; only `CompileLoss` resolves them.

    Args:
        model: A compiled model, which must not be wrapped.
        outputs: Its outputs, tensors or `KerasTensor`s.
    """
    compiled = model._compile_loss
    if compiled is None:
        return None
    if not compiled.built:
        compiled = type(compiled)(
            compiled._user_loss,
            compiled._user_loss_weights,
            output_names=getattr(model, "output_names", None),
        )
        # Labels matter by their structure alone, which is the outputs'.
        compiled.build(outputs, outputs)
    flat: list[Any] = compiled._flat_losses
    return flat


@contextmanager
def losses_in_float32(model: Any) -> Iterator[None]:
    """A context in which built losses of 16 bits take and give float32.

    Losses have the dtype of `floatx()`, which no public name changes afterwards.
    """
    compiled = model._compile_loss
    losses = [loss for _, loss, _, _ in getattr(compiled, "_flat_losses", None) or []]
    changed = [
        (loss, loss._dtype)
        for loss in [compiled, *losses]
        if loss is not None and loss._dtype in ("float16", "bfloat16")
    ]
    try:
        for loss, _ in changed:
            loss._dtype = "float32"
        yield
    finally:
        for loss, dtype in changed:
            loss._dtype = dtype


def loss_arguments(loss: Any) -> dict[str, Any]:
    """The arguments of a loss's function; no config has the axis of sparse labels."""
    arguments: dict[str, Any] = getattr(loss, "_fn_kwargs", {})
    return arguments


def compute_loss(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool
) -> Tensor:
    """The compiled loss. A model's own `compute_loss()` may not take `training`."""
    return model._compute_loss(x, y, y_pred, sample_weight, training=training)


def additional_loss(model: Any, loss: Tensor) -> Tensor:
    """A layer's loss as `compute_loss()` adds it: summed, and scaled on TensorFlow."""
    return model._aggregate_additional_loss(loss)


def override_layer_losses(model: Any, losses: Sequence[Tensor]) -> None:
    """Let `model.losses` be these until they are `[]`; the property has no setter."""
    model._losses_override = list(losses)


def loss_tracker(model: Any) -> Any:
    """The metric that averages the loss; a model's own `metrics` may not hold it."""
    return model._loss_tracker


def metric_signs(model: Any) -> dict[str, int]:
    """1 for each metric of which more is better, -1 for less, 0 where it does not say.

    Metrics that are no number, but one for each class, are left out.

    Only `EarlyStopping` reads it publicly. The metrics must be built.
    """
    signs: dict[str, int] = {}
    for metric in model.metrics:
        for member in getattr(metric, "metrics", [metric]):
            direction = getattr(member, "_direction", None)
            signs[member.name] = {"up": 1, "down": -1}.get(str(direction), 0)
    named = {}
    for name, value in model.get_metrics_result().items():
        if math.prod(getattr(value, "shape", ())) != 1:
            continue
        # Of several outputs, the name of the output comes first.
        ends = [end for end in signs if name == end or name.endswith(f"_{end}")]
        named[name] = signs[max(ends, key=len)] if ends else 0
    return named | {"loss": -1}


def last_compilation(model: Any) -> Any:
    """An object for each call of `compile()`; `get_compile_config()` always copies."""
    return getattr(model, "_compile_config", None)


def build_for_batch(model: Any, batch: Any) -> None:
    """Build a model, its loss and its metrics; `model.build()` builds layers alone."""
    model._symbolic_build(data_batch=batch)


def initial_epoch(model: Any) -> int:
    """The epoch at which a restored run goes on: `fit()` has no argument for it."""
    return int(model._initial_epoch or 0)


def set_initial_epoch(model: Any, epoch: int) -> None:
    """Let `fit()` go on at an epoch, as callbacks that restore a run do."""
    model._initial_epoch = epoch


def sublayers(layer: Any, *, recursive: bool = False) -> list[keras.Layer]:
    """The layers inside of a layer or model; only models have the public `layers`."""
    found: list[keras.Layer] = layer._flatten_layers(
        include_self=False, recursive=recursive
    )
    return found


def looked_up_table(layer: keras.layers.Embedding) -> keras.Variable | None:
    """The variable whose rows an `Embedding` gives, `None` if it gives others.

    The public `embeddings` is a tensor where there is LoRA or quantization.
    """
    if not layer.built or layer.lora_enabled or layer.quantization_mode:
        return None
    return layer._embeddings


def is_random_state(variable: keras.Variable) -> bool:
    """Whether it is a `SeedGenerator`'s; no public name leads to the global one."""
    return bool(variable.name == "seed_generator_state")


def producer(tensor: Any) -> Any:
    """The layer or operation that made a symbolic tensor, `None` if not known."""
    return getattr(getattr(tensor, "_keras_history", None), "operation", None)


def producer_inputs(tensor: Any) -> list[Any]:
    """The inputs that a symbolic tensor was made of; `layer.input` is the first call's.

    `tensor` must have a `producer()`.
    """
    operation, node_index, _ = tensor._keras_history
    inputs: list[Any] = operation._inbound_nodes[node_index].input_tensors
    return inputs


class OverridableBackup(keras.callbacks.BackupAndRestore):  # type: ignore[misc]
    """`BackupAndRestore` whose files are its subclasses' choice: public in no way."""

    def write_state(self) -> None:
        """Write weights, epoch and batch."""
        super()._save_model()

    def restore_state(self) -> None:
        """Read what `write_state()` wrote, if there is anything."""
        super()._load_model()

    def _save_model(self) -> None:
        self.write_state()

    def _load_model(self) -> None:
        self.restore_state()

    @property
    def epoch(self) -> int:
        """Number of epochs that ended."""
        return int(self._current_epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._current_epoch = value

    @property
    def batch(self) -> int:
        """The last batch seen of the epoch after these."""
        return int(self._last_batch_seen)


def back_up_weights_alone(backup: Any) -> None:
    """Let a `BackupAndRestore` save weights without the epoch: one method does both."""
    backup._save_model = lambda: backup.model.save_weights(backup._weights_path)


def write_tensorboard_graph(callback: Any, model: Any) -> None:
    """Let a `TensorBoard` write a model's graph: it does so in `set_model()` alone."""
    fitted, set_model = callback.model, keras.callbacks.Callback.set_model
    set_model(callback, model)
    try:
        callback._write_keras_model_summary()
    finally:
        set_model(callback, fitted)


def register_torch_parameters(model: Any) -> None:
    """Register the parameters that `zero_grad()` clears, which `fit()` does unasked."""
    model._post_build()


def tensorflow_strategy(model: Any) -> Any:
    """The strategy that a model was made under; the public one is never `None`."""
    return model._distribute_strategy


def reduces_logs_of_tensorflow_workers(strategy: Any) -> bool:
    """Whether Keras averages logs over workers, as only it can tell."""
    from keras.src.backend.tensorflow import trainer

    return bool(trainer._collective_all_reduce_multi_worker(strategy))


def tensorflow_logits(output: Tensor) -> Tensor | None:
    """The logits that losses take for an output, `None` if they take the output."""
    logits = getattr(output, "_keras_logits", None)
    operation: Any = getattr(output, "op", None)
    if logits is None and getattr(operation, "type", None) in ("Sigmoid", "Softmax"):
        logits = operation.inputs[0]
    return logits


def update_jax_metrics(
    model: Any,
    metrics: list[Tensor],
    loss: Tensor,
    *,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The logs and the new values of the metrics, as Keras's own step has them."""
    logs, updated = model._update_metrics_variables(
        metrics, loss, x, y, y_pred, sample_weight
    )
    return logs, updated


def restore_jax_state(model: Any, state: Sequence[list[Tensor]]) -> None:
    """Give the variables their values again, which `fit()` moved into the state.

    Without this an error in the first step would leave a model without weights. Only
    Keras knows whether it has them somewhere else.
    """
    values = [value for part in state for value in part]
    if getattr(model, "_jax_state", None) or any(v.is_deleted() for v in values):
        return
    names = ("trainable", "non_trainable", "optimizer", "metrics")
    model._jax_state = {
        f"{name}_variables": part for name, part in zip(names, state, strict=True)
    }
    model._jax_state_synced = False
    model.jax_state_sync()
    model._jax_state = None


class _Replaceable:
    """A function in a module of Keras that threads may replace for a while.

    Other threads call Keras's own, which is back once no thread replaces it.

    Args:
        module: Name of the module, which is imported when the function is replaced.
        name: Name of the function.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self.in_thread: contextvars.ContextVar[Callable[..., Any] | None] = (
            contextvars.ContextVar(name, default=None)
        )
        self.lock = threading.Lock()
        self.num_replacing = 0
        self.of_keras: Any = None

    @contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        """A context in which this thread calls another function.

        Its first argument is Keras's own, before those of the call.
        """
        module = importlib.import_module(self.module)
        with self.lock:
            if self.num_replacing == 0:
                self.of_keras = getattr(module, self.name)
                setattr(module, self.name, self.dispatch(self.of_keras))
            self.num_replacing += 1
        token = self.in_thread.set(function)
        try:
            yield
        finally:
            self.in_thread.reset(token)
            with self.lock:
                self.num_replacing -= 1
                if self.num_replacing == 0:
                    setattr(module, self.name, self.of_keras)

    def dispatch(self, of_keras: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            function = self.in_thread.get()
            if function is None:
                return of_keras(*args, **kwargs)
            return function(of_keras, *args, **kwargs)

        return dispatch


_distribute_data = _Replaceable("keras.src.backend.jax.trainer", "_distribute_data")
_scale_loss = _Replaceable("keras.src.losses.loss", "scale_loss_for_distribution")


def placing_jax_batches(place: PlaceBatch) -> AbstractContextManager[None]:
    """A context in which `place` puts batches on devices, in this thread alone.

    Keras refuses batches that do not divide among the devices. It has no public hook.

    Args:
        place: A function `place(data, layouts, place_in_keras)` that returns the
            placed data; `place_in_keras(data, layouts)` is Keras's own function.
    """

    def distribute_data(place_in_keras: Any, data: Any, layouts: Any = None) -> Any:
        return place(data, layouts, place_in_keras)

    return _distribute_data.replaced(distribute_data)


def losses_of_one_replica() -> AbstractContextManager[None]:
    """A context in which losses are those of the samples that they see.

    Within a strategy of TensorFlow Keras divides means, but no sums, by the number of
    replicas, and so the loss of a batch of which each replica has a share is their sum.
    """
    if keras.config.backend() != "tensorflow":
        return nullcontext()
    return _scale_loss.replaced(lambda of_keras, loss: loss)
