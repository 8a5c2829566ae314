"""The training step and the random numbers on PyTorch."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import torch

from keras_nrs.divergences import copied

Tensor = Any


def _mix(word: int) -> int:
    """A bijection of 32-bit words in which close inputs give unrelated outputs."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


class RandomStream:
    """Independent random tensors from one key, the same for the same key.

    Args:
        key: Integer tensor of shape `(2,)`, as drawn from a `SeedGenerator`.
    """

    def __init__(self, key: Tensor) -> None:
        seed, step = (int(word) & 0xFFFFFFFF for word in key)
        self._device = key.device
        # PyTorch's CPU generator uses 32 bits of its seed. Mixing keeps the steps of
        # one run apart: two of them never get the same word.
        self._generator = torch.Generator(device=self._device)
        self._generator.manual_seed(_mix((_mix(seed) + step) & 0xFFFFFFFF))

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Standard normal numbers."""
        return torch.randn(
            shape,
            generator=self._generator,
            dtype=getattr(torch, dtype),
            device=self._device,
        )

    def rademacher(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Signs, -1 or 1 with equal probability."""
        bits = torch.randint(
            2, shape, generator=self._generator, dtype=torch.int8, device=self._device
        )
        return (2 * bits - 1).to(getattr(torch, dtype))

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


def _global_random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Run with the given states of the global generators, then put back today's."""
    devices = [device] if len(states) > 1 else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(states[0])
        if devices:
            torch.cuda.set_rng_state(states[1], device)
        yield


class BackendTrainer:
    """Steps of an `NRSModel`, as `keras.Model` calls them on PyTorch."""

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
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        kwargs = self._call_kwargs(training=True)
        # Copied before the clean pass advances the seeds: both passes must see the
        # same dropout masks. Keras's unseeded dropout draws from the global generator.
        state = [v.value.detach().clone() for v in base.non_trainable_variables]
        random_state = _global_random_state(key.device)
        # Keras multiplies masks into the weights in place.
        perturbed_weight = copied(sample_weight)
        divergence_weight = copied(sample_weight)

        y_pred = base(x, **kwargs)
        self.built = True
        base.zero_grad()
        clean_loss = base._compute_loss(x, y, y_pred, sample_weight, training=True)
        penalty = sum(map(keras.ops.sum, base.losses))
        weights = [v.value for v in base.trainable_variables]
        with torch.no_grad():
            deltas = self._sample(weights, self.eps.value, RandomStream(key))
        with (
            _replayed(random_state, key.device),
            self._perturbed_scope(weights, deltas, state),
        ):
            perturbed = base(x, **kwargs)
            perturbed_loss = base._compute_loss(
                x, y, perturbed, perturbed_weight, training=True
            )
            divergence = self._divergence(y, y_pred, perturbed, divergence_weight)
        terms = self._terms(
            clean_loss,
            divergence,
            perturbed_loss,
            penalty=penalty,
            alpha=self.alpha.value,
        )
        base._loss_tracker.update_state(terms.total, sample_weight=self._batch_size(x))
        base.optimizer.scale_loss(terms.total).backward()
        trainable = base.trainable_weights[:]
        with torch.no_grad():
            base.optimizer.apply([v.value.grad for v in trainable], trainable)
            self._update_trackers(terms, data)
        logs = base.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs | self._tracker_logs()

    def test_step(self: Any, data: Any) -> Any:
        return self.base_model.test_step(data)

    def predict_step(self: Any, data: Any) -> Any:
        return self.base_model.predict_step(data)
