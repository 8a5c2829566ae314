"""The training step and the random numbers on PyTorch."""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from keras_nrs.groups import Part
from keras_nrs.groups import StepInputs

Tensor = Any


def _mix(word: int) -> int:
    """A bijection of 32-bit words in which close inputs give unrelated outputs."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


# PyTorch's own draws of these take more than twice as long on the CPU.
@functools.cache
def _quantiles() -> Tensor:
    """2**16 equally likely values of a nearly normal variable with variance 1."""
    probabilities = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(probabilities)
    return (quantiles / quantiles.square().mean().sqrt()).float()


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """The bits of each byte as signs: shape `(256, 8)`."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1.0 - 2.0 * bits).to(device)


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    # The noise of all weights is drawn at once.
    draws_whole = True

    def __init__(self, key: Tensor) -> None:
        self._key = key
        seed, step = (int(word) & 0xFFFFFFFF for word in key)
        self._device = key.device
        # PyTorch's CPU generator uses 32 bits of its seed. Mixing keeps the steps of
        # one run apart: two of them never get the same word.
        self._generator = torch.Generator(device=self._device)
        self._generator.manual_seed(_mix((_mix(seed) + step) & 0xFFFFFFFF))

    def fold_in(self, index: int) -> "RandomStream":
        """A stream that is independent of this one and those of other indices."""
        seed, step = (int(word) & 0xFFFFFFFF for word in self._key)
        words = [_mix(_mix(seed) ^ _mix(index + 1)), step]
        return RandomStream(torch.tensor(words, dtype=torch.int64, device=self._device))

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Standard normal numbers. On the CPU they take 65,536 values."""
        if self._device.type != "cpu":
            return torch.randn(
                shape,
                generator=self._generator,
                dtype=getattr(torch, dtype),
                device=self._device,
            )
        size = math.prod(shape)
        indices = self._words(math.ceil(size / 4)).view(torch.uint16)[:size]
        noise = _quantiles().index_select(0, indices.int())
        return noise.reshape(shape).to(getattr(torch, dtype))

    def rademacher(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Signs, -1 or 1 with equal probability."""
        size = math.prod(shape)
        indices = self._words(math.ceil(size / 64)).view(torch.uint8)
        noise = _signs(self._device).index_select(0, indices.int()).reshape(-1)
        return noise[:size].reshape(shape).to(getattr(torch, dtype))

    def _words(self, size: int) -> Tensor:
        """Random words of 64 bits."""
        words = torch.empty(size, dtype=torch.int64, device=self._device)
        return words.random_(-(2**63), None, generator=self._generator)

    def uniform(self, shape: tuple[int, ...] = (), dtype: str = "float32") -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(
            shape,
            generator=self._generator,
            dtype=getattr(torch, dtype),
            device=self._device,
        )


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, without gradients: PyTorch runs eagerly."""
    without_gradients: Callable[..., Any] = torch.no_grad()(function)
    return without_gradients


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
        super().make_train_function(force)  # type: ignore[misc]

    def train_step(self: Any, data: Any) -> dict[str, Tensor]:
        base = self.base_model
        if self.scheme == "baseline":
            return base.train_step(data)
        key = self.seed_generator.next()
        on_schedule = self.interval == 1 or int(key[1]) % self.interval == 0
        if not on_schedule or not self._perturbed_pass_matters():
            return base.train_step(data) | self._tracker_logs()
        base._symbolic_build(data_batch=data)
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
