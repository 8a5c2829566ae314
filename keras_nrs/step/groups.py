"""Groups of samples that share one delta, and the parts of a batch that they take."""

import enum
import math
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from keras import ops
from keras import tree

Tensor = Any


class Coverage(enum.Enum):
    """The samples of a group on which the perturbed pass runs."""

    ALL = enum.auto()
    SOME = enum.auto()
    NONE = enum.auto()


class Group(NamedTuple):
    """Samples of a batch that share their dropout masks and batch moments.

    Attributes:
        number: Index of the group's delta.
        start: Index of the first sample.
        stop: Index after the last sample.
        coverage: Whether the perturbed pass runs on all, some or none of the samples.
        num_perturbed: Number of samples, from the first, on which it runs.
        size: Number of samples that count: all, or none.
        share: `size` divided by the size of the batch.
        perturbed_share: The group's part of all samples on which the perturbed pass
            runs.
    """

    number: int
    start: Any
    stop: Any
    coverage: Coverage
    num_perturbed: Any
    size: Any
    share: Any
    perturbed_share: Any

    @property
    def is_perturbed(self) -> bool:
        return self.coverage is not Coverage.NONE


def split_into_groups(
    batch_size: Any,
    num_perturbations: int = 1,
    perturbed_fraction: float = 1.0,
    *,
    keep_whole: bool = False,
) -> list[Group]:
    """Split a batch into groups, one for each delta.

    The perturbed pass runs on at least one sample of each delta. With a
    `perturbed_fraction` below 1, the samples without a perturbed pass form groups of
    their own, unless `keep_whole`.

    A known batch size leaves no group empty. A batch size that is a tensor may: an
    empty group then borrows a sample of another one, with a share of 0, because the
    mean over no samples is not a number.

    Args:
        batch_size: An int, or a scalar integer tensor.
        num_perturbations: Number of deltas.
        perturbed_fraction: Share of the batch on which the perturbed pass runs.
        keep_whole: Whether a group may hold samples with and without that pass.

    Raises:
        ValueError: if the batch is empty.
    """
    is_known = isinstance(batch_size, int)
    if is_known and batch_size == 0:
        raise ValueError(
            "A batch must hold at least one sample. Received: a batch of 0 samples. "
            "Leave it out."
        )
    minimum, maximum = (min, max) if is_known else (ops.minimum, ops.maximum)
    num_deltas = min(num_perturbations, batch_size) if is_known else num_perturbations
    spans: list[tuple[int, Any, Any, Coverage, Any]] = []
    for i in range(num_deltas):
        start, stop = i * batch_size // num_deltas, (i + 1) * batch_size // num_deltas
        if perturbed_fraction == 1:
            spans.append((i, start, stop, Coverage.ALL, stop - start))
            continue
        rounded = _rounded_product(perturbed_fraction, stop - start)
        num_perturbed = minimum(stop - start, maximum(rounded, 1))
        if keep_whole:
            spans.append((i, start, stop, Coverage.SOME, num_perturbed))
        else:
            middle = start + num_perturbed
            spans.append((i, start, middle, Coverage.ALL, middle - start))
            spans.append((i, middle, stop, Coverage.NONE, 0))
    num_perturbed_in_all = sum(num for *_, num in spans)
    groups = []
    for number, start, stop, coverage, num_perturbed in spans:
        size = stop - start
        if is_known and size == 0:
            continue
        group = Group(
            number,
            start,
            stop,
            coverage,
            num_perturbed,
            size,
            share=_ratio(size, batch_size),
            perturbed_share=_ratio(num_perturbed, num_perturbed_in_all),
        )
        if not is_known and len(spans) > 1:
            start = minimum(start, batch_size - 1)
            group = group._replace(start=start, stop=maximum(stop, start + 1))
            if coverage is Coverage.SOME:
                group = group._replace(num_perturbed=maximum(num_perturbed, 1))
        groups.append(group)
    return groups


def _rounded_product(fraction: float, size: Any) -> Any:
    if isinstance(size, int):
        return math.floor(fraction * size + 0.5)
    product = fraction * ops.cast(size, "float32") + 0.5
    return ops.cast(ops.floor(product), size.dtype)


def _ratio(part: Any, whole: Any) -> Any:
    if isinstance(part, int) and isinstance(whole, int):
        return part / whole
    return ops.cast(part, "float32") / ops.cast(whole, "float32")


def perturbed_share(groups: Sequence[Group], batch_size: Any) -> Any:
    """The share of a batch on which the perturbed pass runs."""
    minimum = min if isinstance(batch_size, int) else ops.minimum
    counted = [minimum(group.num_perturbed, group.size) for group in groups]
    return _ratio(sum(counted), batch_size)


def samples(batch: Any, start: Any, stop: Any) -> Any:
    """The samples from `start` to `stop`."""
    return tree.map_structure(lambda t: None if t is None else t[start:stop], batch)


def reordered(batch: Any, order: Tensor) -> Any:
    """The samples in the order of these indices."""
    return tree.map_structure(
        lambda t: None if t is None else ops.take(t, order, axis=0), batch
    )


def num_samples(data: Any) -> Any:
    """The number of samples in a batch: an int where it is known."""
    return ops.shape(next(i for i in tree.flatten(data) if i is not None))[0]
