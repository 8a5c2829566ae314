"""Models that preprocess their data in `fit()`, such as KerasHub's tasks."""

import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_nrs.backend import loop_over_batches


class _KerasModelMethods(keras.Model):  # type: ignore[misc]
    """`keras.Model`'s own methods, run on the model `owner`."""

    owner: Any

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.fit(self.owner, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.evaluate(self.owner, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.predict(self.owner, *args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.train_on_batch(self.owner, *args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.test_on_batch(self.owner, *args, **kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.predict_on_batch(self.owner, *args, **kwargs)


@functools.cache
def _methods_class(pipeline_model: type) -> type:
    """The pipeline's methods, with `super()` leading to the owner's.

    KerasHub's `PipelineModel.fit()` maps the preprocessing over the data and calls
    `super().fit()`. Between it and `keras.Model` this puts a class that runs the rest
    on another model.
    """

    def preprocess_samples(self: _KerasModelMethods, *args: Any, **kwargs: Any) -> Any:
        return self.owner.base_model.preprocess_samples(*args, **kwargs)

    return type(
        "PreprocessingMethods",
        (pipeline_model, _KerasModelMethods),
        {"preprocess_samples": preprocess_samples},
    )


def with_preprocessing(model: Any) -> Any:
    """The object whose `fit()` and the like preprocess for a wrapped model.

    `None` if the base model does not preprocess.
    """
    for base_class in type(model.base_model).__mro__:
        if base_class.__name__ == "PipelineModel" and "fit" in vars(base_class):
            methods: Any = object.__new__(_methods_class(base_class))
            object.__setattr__(methods, "owner", model)
            return methods
    return None


def preprocessed(name: str) -> Callable[..., Any]:
    """A method of `keras.Model` that first preprocesses as the base model does."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        preprocessing = with_preprocessing(model)
        with loop_over_batches():
            if preprocessing is None:
                return method(model, *args, **kwargs)
            return getattr(preprocessing, name)(*args, **kwargs)

    return run


def as_in_base(name: str) -> Callable[..., Any]:
    """Such a method, or the base model's if its class has one of its own."""
    run = preprocessed(name)

    @functools.wraps(getattr(keras.Model, name))
    def run_as_in_base(model: Any, *args: Any, **kwargs: Any) -> Any:
        base = model.base_model
        is_own = getattr(type(base), name) is not getattr(keras.Model, name)
        if is_own and with_preprocessing(model) is None:
            return getattr(base, name)(*args, **kwargs)
        return run(model, *args, **kwargs)

    return run_as_in_base
