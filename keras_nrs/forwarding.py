"""Which attributes of a wrapped model are its base model's.

A wrapped model reads like the model that it wraps: each public attribute is NRS's own
or the base model's. Attributes that every Keras model has are `Forwarded` one by one;
`ForwardsToBase` finds the others, such as a layer of a user's class or `generate()`.

Keras saves what `dir(model)` has beyond the names of a bare `keras.Model`, in order of
the names. So no name is added there: a forwarded layer would be written under its own
name, and `base_model` without it.
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_nrs import keras_internals


class Forwarded:
    """An attribute or method of every Keras model that is the base model's.

    Until there is a base model, while `keras.Model.__init__()` runs, it is an attribute
    like others.

    Args:
        is_assignable: Whether an assignment is the base model's too. It is dropped
            otherwise: Keras assigns `built` to each model that it calls.
    """

    def __init__(self, *, is_assignable: bool = True) -> None:
        self._is_assignable = is_assignable
        self._owner: type = object
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if not instance.has_base_model():
            own = vars(instance)
            parent = super(self._owner, instance)
            return own[self._name] if self._name in own else getattr(parent, self._name)
        return getattr(instance.base_model, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        if not instance.has_base_model():
            vars(instance)[self._name] = value
        elif self._is_assignable:
            setattr(instance.base_model, self._name, value)


class ForwardsToBase:
    """A mixin for a model whose other public attributes are its `base_model`'s."""

    base_model: keras.Model

    def has_base_model(self) -> bool:
        """Whether `__init__()` has come so far."""
        return self._has_own("base_model")

    def __getattr__(self, name: str) -> Any:
        if self._has_member_of_torch(name):
            return super().__getattr__(name)  # type: ignore[misc]
        kind = type(self).__name__
        if name.startswith("_") or name == "base_model" or not self.has_base_model():
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        base = self.base_model
        try:
            return getattr(base, name)
        except AttributeError:
            if hasattr(type(base), name):
                raise  # A property, whose error says why.
            raise AttributeError(
                f"{kind!r} object has no attribute {name!r}, and its base model "
                f"{base.name!r} of class {type(base).__name__} has none either."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_base(name):
            setattr(self.base_model, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_base(name):
            delattr(self.base_model, name)
        else:
            super().__delattr__(name)

    def _is_of_base(self, name: str) -> bool:
        is_public = not name.startswith("_")
        return is_public and not self._has_own(name) and self.has_base_model()

    def _has_own(self, name: str) -> bool:
        is_here = name in vars(self) or hasattr(type(self), name)
        return is_here or self._has_member_of_torch(name)

    def _has_member_of_torch(self, name: str) -> bool:
        """Whether PyTorch keeps it, where only its `__getattr__()` finds it."""
        members = ("_parameters", "_buffers", "_modules")
        return any(name in vars(self).get(kind, ()) for kind in members)


class TensorBoardGraphs(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes the base model's graph, where `TensorBoard` knows Keras's classes alone.

    Args:
        callbacks: The callbacks of a training.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        super().__init__()
        kind = keras.callbacks.TensorBoard
        self._boards = [board for board in callbacks if isinstance(board, kind)]

    def on_train_begin(self, logs: Any = None) -> None:
        for board in self._boards:
            if board.write_graph:
                base_model = self.model.base_model
                keras_internals.write_tensorboard_graph(board, base_model)
