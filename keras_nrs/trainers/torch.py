"""The training step on PyTorch."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from keras_nrs.step.groups import Part
from keras_nrs.step.groups import StepInputs

Tensor = Any


class BackendTrainer:
    """Steps of an `NRSModel`, as `keras.Model` calls them on PyTorch."""

    # Keras trains on one device of one process here.
    _loop_over_batches = staticmethod(nullcontext)

    @staticmethod
    def _scope_of(model: Any) -> Any:
        """A scope in which variables are placed on the devices that the model is on."""
        return nullcontext()

    @staticmethod
    def process_index() -> int:
        """The index of this process among all: there is one."""
        return 0

    @staticmethod
    def values_of_processes(values: list[int]) -> list[list[int]]:
        """These values in every process."""
        return [values]

    def make_train_function(self: Any, force: bool = False) -> None:
        # Keras registers the parameters, which `zero_grad()` clears, of the model that
        # is fitted. Here that is not the base model.
        self.base_model._post_build()
        is_new = force or self.train_function is None
        super().make_train_function(force)  # type: ignore[misc]
        if is_new and self.jit_compile and not self.run_eagerly:
            # Keras leaves it open which shapes are dynamic. PyTorch 2.13 takes layers
            # that are called twice for dynamic, and fails to compile them.
            self.train_function = torch.compile(
                lambda data: self.train_step(data[0]), dynamic=False
            )

    def train_step(self: Any, data: Any) -> dict[str, Tensor]:
        base = self.base_model
        if self.scheme == "baseline":
            return base.train_step(data)
        key = self.seed_generator.next()
        if not self._is_due(key) or not self._perturbed_pass_matters():
            return base.train_step(data) | self._tracker_logs()
        # The first call draws random numbers, and a resumed training makes it later.
        with self._random_numbers_put_back():
            self._symbolic_build_of_base(data)
        self.built = True
        base.zero_grad()
        inputs = StepInputs(
            [v.value for v in base.non_trainable_variables],
            [v.value for v in base.metrics_variables],
            data,
            self.eps.value,
            self.alpha.value,
            key,
        )
        outcome = self._objective([v.value for v in base.trainable_variables], inputs)
        base.optimizer.scale_loss(outcome.terms.total).backward()
        trainable = base.trainable_weights[:]
        with torch.no_grad():
            base.optimizer.apply([v.value.grad for v in trainable], trainable)
            return self._assign_outcome(outcome, data)

    # Its batches are of sizes that no real one has.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _symbolic_build_of_base(self: Any, data: Any) -> None:
        super()._symbolic_build_of_base(data)  # type: ignore[misc]

    # Or a program would be compiled for each step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _is_due(self: Any, key: Tensor) -> bool:
        """Whether `interval` has a perturbed pass at this step."""
        return self.interval == 1 or int(key[1]) % self.interval == 0

    # No graph can have a generator of random numbers.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _perturbed(self: Any, *args: Any) -> list[Tensor]:
        perturbed: list[Tensor] = super()._perturbed(*args)  # type: ignore[misc]
        return perturbed

    # As above.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _random_order(self: Any, inputs: StepInputs) -> Tensor:
        return super()._random_order(inputs)  # type: ignore[misc]

    def _perturbed_pass(
        self: Any, weights: list[Tensor], inputs: StepInputs, part: Part
    ) -> Any:
        run = super()._perturbed_pass  # type: ignore[misc]
        if not self.memory_efficient:
            return run(weights, inputs, part)
        # It is run again when its gradient is due. That is after the gradient of the
        # clean pass, which begins later, and whose activations are gone by then.
        return torch.utils.checkpoint.checkpoint(
            lambda *weights: run(list(weights), inputs, part),
            *weights,
            use_reentrant=False,
        )

    def _random_numbers_put_back(self: Any) -> Any:
        device = self.seed_generator.state.value.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def test_step(self: Any, data: Any) -> Any:
        return self.base_model.test_step(data)

    def predict_step(self: Any, data: Any) -> Any:
        return self.base_model.predict_step(data)
