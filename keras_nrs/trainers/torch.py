"""The training step on PyTorch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from keras_nrs import keras_internals
from keras_nrs.backend import not_in_graphs
from keras_nrs.backend import restored_random_state
from keras_nrs.step.host_random import drawing_from
from keras_nrs.step.host_random import host_random_state
from keras_nrs.step.model_passes import Pass
from keras_nrs.step.outcomes import StepInputs
from keras_nrs.trainers.trainer import Logs
from keras_nrs.trainers.trainer import Trainer

Tensor = Any


class BackendTrainer(Trainer):
    """The steps of an `NRSModel`, as `keras.Model` calls them on PyTorch."""

    def make_train_function(self, make: Callable[[bool], None], force: bool) -> None:
        model = self.model
        # Keras registers the parameters of the fitted model, which `zero_grad()`
        # clears. Here the base model has them.
        keras_internals.register_torch_parameters(self.base_model)
        is_new = force or model.train_function is None
        make(force)
        if is_new and model.jit_compile and not model.run_eagerly:
            # Keras leaves it open which shapes are dynamic. PyTorch 2.13 takes layers
            # that are called twice for dynamic, and fails to compile them.
            model.train_function = torch.compile(
                lambda data: self.train_step(data[0]), dynamic=False
            )

    def num_replicas(self) -> int:
        return 1

    def train_step(self, data: Any) -> Logs:
        base, model, objective = self.base_model, self.model, self.objective
        if self.options.scheme == "baseline":
            logs: Logs = base.train_step(data)
            return logs
        key = model.seed_generator.next()
        eps, alpha = self.coefficients_in(key[1])
        if not self._is_due(key) or not self.needs_perturbed_pass():
            return base.train_step(data) | self.tracker_logs()
        # The first call draws random numbers, and a resumed training makes it later.
        with restored_random_state(key):
            objective.build(data)
        base.zero_grad()
        inputs = StepInputs(
            [v.value for v in base.non_trainable_variables],
            [v.value for v in base.metrics_variables],
            data,
            eps,
            alpha,
            key,
            loss_scale=base.optimizer.scale_loss(1.0),
        )
        weights = [v.value for v in base.trainable_variables]
        batch = objective.with_directions(weights, inputs, objective.split(inputs))
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
        with torch.no_grad():
            for variable, value in outcome.updates:
                variable.assign(value)
            self.update_metrics_of_loss(outcome, data)
            base.optimizer.apply([v.value.grad for v in trainable], trainable)
            return self.assign_outcome(outcome, data)

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
    return torch.utils.checkpoint.checkpoint(
        lambda *weights: run(list(weights)),
        *weights,
        use_reentrant=False,
        # PyTorch itself makes the second run draw the same from its own generators.
        context_fn=lambda: (nullcontext(), drawing_from(state)),
    )
