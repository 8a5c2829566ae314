"""Random tensors on PyTorch."""

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

Tensor = Any


def _mix(word: int) -> int:
    """A bijection of 32-bit words in which close inputs give unrelated outputs."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


# Elements that are drawn at a time.
_BLOCK = 2**17


# PyTorch's own draws take more than twice as long on the CPU.
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
    cuts_whole = True
    # Whether some rows of a tensor can be drawn without the others.
    draws_rows = False

    def __init__(self, key: Tensor) -> None:
        # On a GPU this waits for all that it has to do.
        self._seed, self._step = (int(word) & 0xFFFFFFFF for word in key.tolist())
        self._device = key.device

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        # PyTorch's CPU generator uses 32 bits of its seed. Mixing keeps the steps of
        # one run apart: two of them never get the same word.
        generator = torch.Generator(device=self._device)
        generator.manual_seed(_mix((_mix(self._seed) + self._step) & 0xFFFFFFFF))
        return generator

    def fold_in(self, index: int) -> "RandomStream":
        """A stream independent of this one and of the streams of other indices."""
        stream = copy.copy(self)
        stream._seed = _mix(_mix(self._seed) ^ _mix(index + 1))
        vars(stream).pop("_generator", None)
        return stream

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
        words = self._words(math.ceil(size / 4)).view(torch.uint16)[:size]
        noise = torch.empty(size)
        # By blocks, whose indices stay in the cache.
        for indices, part in zip(words.split(_BLOCK), noise.split(_BLOCK), strict=True):
            torch.index_select(_quantiles(), 0, indices.int(), out=part)
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


def restored_random_state(like: Tensor) -> AbstractContextManager[None]:
    """A context that leaves global random generators as they were.

    Keras's unseeded dropout draws from the generator of its device: `like`'s.
    """
    devices = [like.device] if like.device.type == "cuda" else []
    scope: AbstractContextManager[None] = torch.random.fork_rng(devices=devices)
    return scope


def random_state(like: Tensor) -> Any:
    """The states of the global random generators that layers draw from."""
    on_device = None
    if like.device.type == "cuda":
        on_device = torch.cuda.get_rng_state(like.device)
    return torch.get_rng_state(), on_device


def set_random_state(like: Tensor, state: Any) -> None:
    """Give the global random generators a state again."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, like.device)


def unrepeatable_draws(function: Callable[[Any], Any], inputs: Any) -> list[str]:
    """None: a restored state repeats all draws."""
    return []
