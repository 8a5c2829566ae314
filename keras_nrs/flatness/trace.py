"""The trace of the Hessian."""

import math
from dataclasses import dataclass
from typing import Any
from typing import Unpack

import keras
import numpy as np
from numpy.typing import NDArray

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_seed
from keras_nrs._signatures import with_options_of
from keras_nrs.flatness.operator import OperatorOptions
from keras_nrs.flatness.operator import hessian_operator
from keras_nrs.flatness.progress import Progress

Array = NDArray[Any]

_METHODS = ("hutch++", "hutchinson")
# With fewer products Hutch++ has too few samples to estimate its error.
_FEWEST_PRODUCTS = 6


@dataclass(frozen=True, kw_only=True)
class Trace:
    """An unbiased estimate of a trace.

    Attributes:
        value: The estimate, in the unit of the loss per squared weight.
        standard_error: Its standard error, 0 if the estimate is exact.
        num_products: Hessian-vector products used, each of which takes two gradients
            over the data set.
    """

    value: float
    standard_error: float
    num_products: int


@with_options_of(hessian_operator)
def hessian_trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    method: str = "hutch++",
    num_products: int = 60,
    seed: int = 0,
    verbose: int = 0,
    **options: Unpack[OperatorOptions],
) -> Trace:
    """The trace of the Hessian of the compiled loss: the sum of its eigenvalues.

    Args:
        model, x, y: As in `hessian_operator`.
        method: `"hutchinson"` is the mean of `z.T @ H @ z` over random signs z.
            `"hutch++"` computes the trace exactly on a subspace that a third of the
            products span, and uses Hutchinson's estimator for the rest. It has a
            smaller error if few eigenvalues are large, as in trained networks.
        num_products: Hessian-vector products to use, >= 6. With one for each selected
            weight the trace is exact.
        seed: Seed of the random vectors.
        verbose: 1 to show progress.
        **options: The keyword arguments of `hessian_operator`, such as `variables`.

    Returns:
        A `Trace`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
        NotImplementedError: if the model cannot be differentiated twice.

    References:
        [Hutchinson, 1989](https://doi.org/10.1080/03610918908812806);
        [Meyer et al., 2021](https://arxiv.org/abs/2010.09649).

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    >>> y = np.zeros((2, 1), "float32")
    >>> round(keras_nrs.flatness.hessian_trace(model, x, y).value, 3)
    7.0
    """
    check_choice("method", method, _METHODS)
    num_products = check_int("num_products", num_products, minimum=_FEWEST_PRODUCTS)
    rng = np.random.default_rng(check_seed("seed", seed))
    operator = hessian_operator(model, x, y, **options)
    n = operator.shape[0]
    progress = Progress(verbose, min(n, num_products), "product")

    def products(vectors: Array) -> Array:
        columns = []
        for vector in vectors.T:
            columns.append(operator.matvec(vector))
            progress.advance()
        return np.stack(columns, axis=1)

    if num_products >= n:
        samples = np.full(2, np.trace(products(np.eye(n))))
        exact = 0.0
    elif method == "hutchinson":
        signs = _random_signs(rng, n, num_products)
        samples = np.sum(signs * products(signs), axis=0)
        exact = 0.0
    else:
        third = num_products // 3
        basis, _ = np.linalg.qr(products(_random_signs(rng, n, third)))
        exact = float(np.sum(basis * products(basis)))
        signs = _random_signs(rng, n, num_products - 2 * third)
        rest = signs - basis @ (basis.T @ signs)
        samples = np.sum(rest * products(rest), axis=0)
    progress.finish()
    error = np.std(samples, ddof=1) / math.sqrt(len(samples))
    return Trace(
        value=exact + float(np.mean(samples)),
        standard_error=float(error),
        num_products=operator.num_products,
    )


def _random_signs(rng: np.random.Generator, n: int, columns: int) -> Array:
    return rng.choice([-1.0, 1.0], size=(n, columns))
