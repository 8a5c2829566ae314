"""Batches of data in all the forms that `fit()` takes."""

from collections.abc import Iterable
from collections.abc import Iterator
from itertools import islice
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_nrs._checks import check_int
from keras_nrs.keras_internals import get_data_adapter


class Batch(NamedTuple):
    """A batch as tensors. `y` and `sample_weight` may be `None`."""

    x: Any
    y: Any
    sample_weight: Any

    @property
    def num_samples(self) -> int:
        leaves = keras.tree.flatten(self.x)
        return int(next(leaf for leaf in leaves if leaf is not None).shape[0])


class Batches:
    """The batches of a data set, with the same samples at each iteration.

    The device holds one batch at a time. The host keeps all batches of a generator,
    which runs once, and the first `steps` batches of a data set, which may shuffle.
    Any other data set is checked: an iteration over other samples than those of the
    first one ends with an error.

    Args:
        model: The model. The preprocessor of a KerasHub task is applied.
        x: Inputs: an array of shape `(num_samples, ...)`, or a list or dict of them.
            Or batches `x`, `(x, y)` or `(x, y, sample_weight)`: a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a `DataLoader` of PyTorch, or a generator that
            ends or comes with `steps`.
        y: Labels, if `x` is arrays.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays.
        steps: Number of batches to use. Defaults to all.

    Raises:
        TypeError, ValueError: if an argument is not as described, or there is no data.
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 32,
        steps: int | None = None,
    ) -> None:
        batch_size = check_int("batch_size", batch_size, minimum=1)
        if steps is not None:
            steps = check_int("steps", steps, minimum=1)
        self._is_arrays = is_arrays = check_data(x, y, sample_weight)
        self._preprocess = getattr(model, "preprocess_samples", None)
        try:
            self._adapter = get_data_adapter(
                x,
                y=y,
                sample_weight=sample_weight,
                batch_size=batch_size if is_arrays else None,
                steps_per_epoch=steps,
            )
        except ValueError as error:
            raise ValueError(
                "`x` must be an array, a list or dict of arrays, or a data set or "
                f"generator of batches. Received: x of type {type(x).__name__}. "
                f"{error}"
            ) from error
        self._steps = steps or self._adapter.num_batches
        self._on_host: list[Any] = []
        self._single: Batch | None = None
        self._digest: int | None = None
        _check_not_endless(x, self._steps)
        # A data set that shuffles would give other first batches each time.
        is_truncated = steps is not None and not is_arrays
        if isinstance(x, Iterator) or is_truncated or self._steps == 1:
            self._on_host = list(self._read_numpy())
            if not self._on_host:
                raise ValueError("`x` must yield at least one batch. Received: none.")
        # A single batch stays on the device, and callers may cache results for it.
        if len(self._on_host) == 1:
            self._single = self._to_batch(self._on_host[0])

    def __len__(self) -> int:
        """Number of batches, counted if the data set does not know it."""
        if self._on_host:
            return len(self._on_host)
        if self._steps is None:
            self._steps = sum(1 for _ in self._read_numpy())
        return int(self._steps)

    @property
    def is_single(self) -> bool:
        """Whether there is one batch, the same `Batch` at each iteration."""
        return self._single is not None

    def __iter__(self) -> Iterator[Batch]:
        if self._single is not None:
            return iter([self._single])
        return map(self._to_batch, self._on_host or self._read_checked())

    def _read_checked(self) -> Iterator[Any]:
        """The batches, and an error after the last one if the samples have changed."""
        if self._is_arrays:
            yield from self._read_numpy()
            return
        digest = 0
        for data in self._read_numpy():
            digest += _digest(data)
            yield data
        if self._digest not in (None, digest):
            raise ValueError(
                "`x` must yield the same samples at each pass, in any order. Received: "
                "other samples than at the first pass. Remove what is random before "
                "batch() (an augmentation, or shuffle() before take() or "
                "drop_remainder=True), or pass `steps`, with which the batches of the "
                "first pass are kept in memory."
            )
        self._digest = digest

    def _read_numpy(self) -> Iterator[Any]:
        """The batches as NumPy arrays, in the memory of the host."""
        self._adapter.on_epoch_begin()
        try:
            yield from islice(iter(self._adapter.get_numpy_iterator()), self._steps)
        finally:
            self._adapter.on_epoch_end()

    def _to_batch(self, data: Any) -> Batch:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._preprocess is not None:
            data = self._preprocess(x, y, sample_weight)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return Batch(*map(_to_tensors, (x, y, sample_weight)))


def _digest(data: Any) -> int:
    """A number that depends on the samples of a batch, but not on their order."""
    columns: list[Iterable[bytes]] = []
    for leaf in keras.tree.flatten(data):
        array = np.asarray(leaf)
        if array.ndim and array.dtype == object:
            columns.append(repr(value).encode() for value in array.tolist())
        elif array.ndim:
            rows = array.reshape(len(array), -1)
            columns.append(row.tobytes() for row in rows)
    # Joined: the hash of a tuple is nearly linear, so sums of them often agree.
    return sum(hash(b"\0".join(row)) for row in zip(*columns, strict=False))


def _to_tensors(structure: Any) -> Any:
    if structure is None:
        return None
    return keras.tree.map_structure(
        lambda a: None if a is None else ops.convert_to_tensor(a), structure
    )


def check_data(x: Any, y: Any, sample_weight: Any) -> bool:
    """Whether the data is arrays, or an error if they differ in length."""
    # `None` for one of several inputs is Keras's to judge: it may be optional.
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "`y` and `sample_weight` must be None where `x` is not arrays, because "
                f"`x` yields all three. Received: x of type {type(x).__name__} and "
                "another argument."
            )
        if isinstance(x, list | tuple | dict | str | int | float) or x is None:
            raise TypeError(
                "`x` must be an array, a list or dict of arrays, or a data set or "
                f"generator of batches. Received: x of type {type(x).__name__}."
            )
        return False
    for name, argument in (("y", y), ("sample_weight", sample_weight)):
        if not all(
            leaf is None or hasattr(leaf, "shape")
            for leaf in keras.tree.flatten(argument)
        ):
            raise TypeError(
                f"`{name}` must be an array, or a list or dict of arrays. Received: "
                f"{name} of type {type(argument).__name__}. For example: "
                f"{name}=numpy.array({name})"
            )
    arguments = {"x": x, "y": y, "sample_weight": sample_weight}
    lengths = {
        name: sorted(
            {
                leaf.shape[0] if leaf.shape else 0
                for leaf in keras.tree.flatten(argument)
                if leaf is not None
            }
        )
        for name, argument in arguments.items()
        if argument is not None
    }
    if len({n for ns in lengths.values() for n in ns}) != 1 or lengths["x"] == [0]:
        raise ValueError(
            "`x` must be arrays with one number of samples, at least one, and `y` and "
            f"`sample_weight` must have the same number. Received: {lengths}."
        )
    return True


def _check_not_endless(x: Any, steps: int | None) -> None:
    """Raise an error if a data set is known to be endless."""
    cardinality = getattr(x, "cardinality", lambda: 0)()
    is_endless = int(cardinality) == -1 or isinstance(x, keras.utils.PyDataset)
    if steps is None and is_endless:
        raise ValueError(
            "`steps` must be the number of batches to use if `x` is an endless data "
            f"set. Received: steps=None and x of type {type(x).__name__}."
        )


def check_not_empty(x: Any) -> None:
    """Raise an error if data is known to be empty, which `fit()` may not notice."""
    leaves = keras.tree.flatten(x)
    # `None` for one of several inputs is Keras's to judge.
    lengths = {_length_if_known(leaf) for leaf in leaves if leaf is not None}
    if x is None or not leaves or lengths == {0}:
        raise ValueError(
            "`x` must hold at least one sample. Received: x of type "
            f"{type(x).__name__} without any."
        )


def _length_if_known(data: Any) -> int | None:
    """Number of samples or batches, `None` if it is unknown or infinite."""
    try:
        return None if isinstance(data, str | bytes) else len(data)
    except TypeError:
        return None
