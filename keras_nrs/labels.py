"""Errors that say which labels a loss was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras


@contextmanager
def naming_labels(y: Any, outputs: Any, sample_weight: Any = None) -> Iterator[None]:
    """A context in which an error of a loss names the shapes of its labels.

    Labels that cannot belong to the outputs are a `ValueError` on all backends.

    Args:
        y: Labels.
        outputs: The model's outputs, `None` if they are not known.
        sample_weight: Weights of the samples, or `None`.
    """
    try:
        yield
    except Exception as error:
        named = isinstance(y, dict) and isinstance(outputs, dict)
        if named and isinstance(error, KeyError) and error.args[0] in outputs:
            raise ValueError(
                f"`y` must have labels for the output {error} as well, which the "
                f"compiled loss or metrics read. Received: labels for {list(y)}. With "
                "metrics, Keras reads labels of outputs without a loss too: pass zeros "
                "there, or, if only one output has labels, pass them without a dict."
            ) from error
        if y is None and outputs is not None:
            raise ValueError(
                "`y` must be labels, which the compiled loss compares with the model's "
                f"outputs of shape {_shapes(outputs)}. Received: y=None. The loss "
                f"could not be computed: {error}"
            ) from error
        text = (
            "`y` must be labels that the loss can compare with the model's outputs: "
            "of the same shape or, for indices of classes, without its last axis. "
            "`sample_weight` must have the first axes of that shape. "
            f"Received: y of shape {_shapes(y)} for outputs of shape "
            f"{_shapes(outputs)}, with sample_weight of shape {_shapes(sample_weight)}."
        )
        if outputs is None or _labels_fit(y, outputs, sample_weight):
            error.add_note(text)
            raise
        raise ValueError(f"{text} The loss could not be computed: {error}") from error


def _shapes(structure: Any) -> Any:
    return keras.tree.map_structure(
        lambda t: None if t is None else tuple(getattr(t, "shape", ())), structure
    )


def _labels_fit(y: Any, outputs: Any, sample_weight: Any) -> bool:
    """Whether all outputs have labels, of shapes that a loss may take."""
    if isinstance(y, dict) and isinstance(outputs, dict) and set(y) != set(outputs):
        return False
    labels, tensors = keras.tree.flatten(y), keras.tree.flatten(outputs)
    weights = keras.tree.flatten(sample_weight)
    if len(labels) != len(tensors) or any(label is None for label in labels):
        return False
    return all(
        _has_one_of(label, shape, shape[:-1], (*shape[:-1], 1))
        for label, shape in zip(labels, _shapes(tensors), strict=True)
    ) and all(
        w is None
        or _has_one_of(w, shape[: len(w.shape)], (*shape[: len(w.shape) - 1], 1))
        for w, shape in zip(weights, _shapes(tensors), strict=False)
    )


def _has_one_of(tensor: Any, *shapes: tuple[int | None, ...]) -> bool:
    """Whether a tensor has one of these shapes, in which `None` fits any length."""
    own = tuple(getattr(tensor, "shape", ()))
    return any(
        len(own) == len(shape)
        and all(
            None in pair or pair[0] == pair[1] for pair in zip(own, shape, strict=True)
        )
        for shape in shapes
    )
