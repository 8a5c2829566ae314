"""A user's script and data by name, for `keras-nrs tune`."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from keras_nrs._checks import check_int

Array = NDArray[Any]

DIGITS, FASHION_MNIST = "digits", "fashion-mnist"


class Data(NamedTuple):
    """Samples to train with, and those to choose by if they are given apart."""

    x: Array
    y: Array
    validation: tuple[Array, Array] | None = None


def load_factory(name: str) -> Callable[..., keras.Model]:
    """The function that `script.py:make_model` names.

    Raises:
        ValueError: if there is no such file, or no such function in it.
        RuntimeError: if the file raises an error. So does the function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not file or not function.isidentifier() or not path.is_file():
        raise ValueError(
            "`script` must be the path of a Python file and the name of a function in "
            f"it, as in script.py:make_model. Received: script={name!r}."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(
            "`script` must be a Python file, whose name ends in .py. Received: "
            f"script={name!r}."
        )
    module = importlib.util.module_from_spec(spec)
    # As when the script is run: it may import its neighbours.
    sys.path.insert(0, str(path.resolve().parent))
    # Dataclasses and pickles look there for what the file defines.
    sys.modules.setdefault(path.stem, module)
    with _errors_of(file):
        spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(
            f"`script` must name a function of {file}. Received: {function!r}, which "
            f"is {'missing' if found is None else repr(found)} there."
        )

    @functools.wraps(found)
    def factory(*args: Any, **kwargs: Any) -> keras.Model:
        with _errors_of(name):
            return found(*args, **kwargs)

    return factory


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """A context for a user's code, whose errors are none of the command's arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error


def load_data(name: str, model: keras.Model, *, samples: int | None = None) -> Data:
    """Data to train with; test samples of the known sets are left out.

    Args:
        name: `"digits"` of scikit-learn, without the test images of the demo;
            `"fashion-mnist"`, the training images; or the path of an .npz file with the
            arrays x and y, and x_val and y_val if validation samples are given apart.
        model: A model, whose input shape images take.
        samples: Number of samples to take at random; `None` for all.

    Raises:
        ValueError: if there is no such file, or the arrays are missing in it.
    """
    if name == DIGITS:
        from keras_nrs._digits import load_digits
        from keras_nrs._digits import pool_and_test

        x, y = load_digits()
        pool, _ = pool_and_test(y)
        data = Data(_shaped(x[pool], model), y[pool])
    elif name == FASHION_MNIST:
        from keras_nrs._fashion_mnist import load_fashion_mnist

        (x, y), _ = load_fashion_mnist()
        data = Data(_shaped(x, model), y.astype("int32"))
    else:
        data = _from_file(name)
    if samples is None:
        return data
    check_int("samples", samples, minimum=2, maximum=len(data.x))
    chosen = np.random.default_rng(0).permutation(len(data.x))[:samples]
    return data._replace(x=data.x[chosen], y=data.y[chosen])


def _from_file(name: str) -> Data:
    try:
        with np.load(name) as arrays:
            has_validation = "x_val" in arrays
            apart = (arrays["x_val"], arrays["y_val"]) if has_validation else None
            return Data(arrays["x"], arrays["y"], apart)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"`data` must be {DIGITS!r}, {FASHION_MNIST!r} or an .npz file with the "
            "arrays x and y, as numpy.savez(file, x=x, y=y) writes them. Received: "
            f"data={name!r}. {error}"
        ) from error


def _shaped(images: Array, model: keras.Model) -> Array:
    """Images in the shape of a model's input."""
    shape = getattr(model, "input_shape", None)
    return images if shape is None else images.reshape(-1, *shape[1:])
