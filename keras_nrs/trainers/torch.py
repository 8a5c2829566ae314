"""The training step on PyTorch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from keras_nrs import keras_internals
from keras_nrs.backend import not_in_graphs
from keras_nrs.backend import restored_random_state
from keras_nrs.backend.torch.devices import means_over_processes
from keras_nrs.backend.torch.devices import metrics_of_all_processes
from keras_nrs.backend.torch.devices import processes
from keras_nrs.backend.torch.devices import share_first_values
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state
from keras_nrs.step.model_passes import Pass
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.trainers.trainer import Logs
from keras_nrs.trainers.trainer import Trainer

Tensor = Any


class BackendTrainer(Trainer):
    """The steps of an `NRSModel`, as `keras.Model` calls them on PyTorch.

    In a process group of `torch.distributed` each process is a replica: it draws its
    own deltas, and takes the mean of all gradients and of all moving statistics.
    """

    # The index of this process, their number, and whether they have equal values.
    _processes = 0, 1
    _is_shared = False
    _is_built = False

    def make_train_function(self, make: Callable[[bool], None], force: bool) -> None:
        model = self.model
        # Keras registers the parameters of the fitted model, which `zero_grad()`
        # clears. Here the base model has them.
        keras_internals.register_torch_parameters(self.base_model)
        is_new = force or model.train_function is None
        if is_new:
            self._is_shared = self._is_built = False
        self._processes = processes()
        make(force)
        if is_new and model.jit_compile and not model.run_eagerly:
            # Keras leaves it open which shapes are dynamic. PyTorch 2.13 takes layers
            # that are called twice for dynamic, and fails to compile them.
            model.train_function = torch.compile(
                lambda data: self.train_step(data[0]), dynamic=False
            )

    def num_replicas(self) -> int:
        return processes()[1]

    def joined_metrics(self) -> AbstractContextManager[None] | None:
        if self.num_replicas() == 1:
            return None
        return metrics_of_all_processes(self.model.metrics_variables)

    def train_step(self, data: Any) -> Logs:
        base, model, objective = self.base_model, self.model, self.objective
        replica, num_replicas = self._processes
        is_plain = self.options.scheme == "baseline"
        if is_plain and num_replicas == 1:
            logs: Logs = base.train_step(data)
            return logs
        if num_replicas > 1 and not self._is_shared:
            self._share_first_values(data)
        key = model.seed_generator.next()
        eps, alpha = self.coefficients_in(key[1])
        perturbs = not is_plain and self._is_due(key) and self.needs_perturbed_pass()
        if not perturbs and num_replicas == 1:
            return base.train_step(data) | self.tracker_logs()
        self._build(data, key)
        variables = objective.find_variables()
        if not variables.trainable:
            return base.train_step(data) | self.tracker_logs()
        base.zero_grad()
        inputs = StepInputs(
            [v.value for v in variables.non_trainable],
            [v.value for v in variables.metrics],
            data,
            eps,
            alpha,
            key,
            replica,
            loss_scale=base.optimizer.scale_loss(1.0),
        )
        weights = [v.value for v in variables.trainable]
        batch = objective.split(inputs, perturbs=perturbs)
        outputs = None
        if perturbs:
            batch = self.with_directions(weights, inputs, batch, means_over_processes)
            outputs = objective.perturbed_outputs(
                weights,
                inputs,
                batch,
                recompute=_recompute if self.options.memory_efficient else None,
            )
        passes = objective.passes(weights, inputs, batch, outputs)
        outcome = objective.outcome(weights, inputs, passes)
        base.optimizer.scale_loss(outcome.terms.total).backward()
        trainable = base.trainable_weights[:]
        gradients = means_over_processes([v.value.grad for v in trainable])
        with torch.no_grad():
            if num_replicas > 1:
                outcome = self.with_mean_state(outcome, inputs, means_over_processes)
            for variable, value in outcome.updates:
                variable.assign(value)
            self.update_metrics_of_loss(outcome, data)
            base.optimizer.apply(gradients, trainable)
            return self.assign_outcome(outcome, data, weight=int(perturbs))

    @not_in_graphs
    def _build(self, data: Any, key: Tensor) -> None:
        """Build what is unbuilt, in the first step: to look for it takes time."""
        if not self._is_built:
            # It draws random numbers, and a resumed training draws them later.
            with restored_random_state(key):
                self.objective.build(data)
            self._is_built = True

    def _share_first_values(self, data: Any) -> None:
        """Give all processes the weights, states and seeds of the first one."""
        base, model = self.base_model, self.model
        with restored_random_state(model.seed_generator.state.value):
            self.objective.build(data)
        base.optimizer.build(base.trainable_variables)
        share_first_values([*model.variables, *base.optimizer.variables])
        self._is_shared = True

    @not_in_graphs
    def _is_due(self, key: Tensor) -> bool:
        """Whether `interval` has a perturbed pass at this step."""
        interval = self.options.interval
        return interval == 1 or int(key[1]) % interval == 0

    def test_step(self, data: Any) -> Logs:
        logs: Logs = self.base_model.test_step(data)
        return logs

    def predict_step(self, data: Any) -> Any:
        return self.base_model.predict_step(data)


# It cannot compile checkpoints with contexts.
@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
def _recompute(run: Pass, weights: list[Tensor]) -> Any:
    """Run a pass now, and once more when its gradient is due.

    The clean pass begins later, so its gradient comes first, and its activations are
    gone by then.
    """
    state = host_random_state()
    # To stop early PyTorch raises an error. Keras keeps its traceback, and with it all
    # activations, until Python collects its garbage.
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return torch.utils.checkpoint.checkpoint(
            lambda *weights: run(list(weights)),
            *weights,
            use_reentrant=False,
            # PyTorch itself makes the second run draw the same from its own generators.
            context_fn=lambda: (nullcontext(), drawing_from(state)),
        )
