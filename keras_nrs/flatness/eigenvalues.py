"""Extreme eigenvalues of the Hessian."""

import math
import warnings
from dataclasses import dataclass
from typing import Any
from typing import Unpack

import keras
import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError
from scipy.sparse.linalg import ArpackNoConvergence
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive
from keras_nrs._checks import check_seed
from keras_nrs.flatness.operator import HessianOperator
from keras_nrs.flatness.operator import OperatorOptions
from keras_nrs.flatness.operator import hessian_operator
from keras_nrs.flatness.progress import Progress

Array = NDArray[Any]

_WHICH = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
# ARPACK looks at convergence after as many products. With SciPy's choice of 20 the
# largest eigenvalue, which mostly stands out, would take nearly twice the time.
_FEWEST_VECTORS = 12
# A matrix of this size is built whole.
_SMALL = 24


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Some eigenvalues of a symmetric operator.

    Attributes:
        eigenvalues: Shape `(k,)`, descending, in the unit of the loss per squared
            weight. NaN for those that were not found.
        residuals: Shape `(k,)`, norms of `H v - eigenvalue * v` for the unit
            eigenvectors v, measured by one more product each. There is an eigenvalue
            within this distance of each one reported.
        converged: Whether all were found to the tolerance asked for.
        num_products: Hessian-vector products used, each of which takes two gradients
            over the data set.
        eigenvectors: One for each eigenvalue, as a list of arrays in the shapes of
            the model's trainable variables (zeros for those not selected), ready for
            `loss_landscape(directions=...)`. `None` unless asked for.
    """

    eigenvalues: Array
    residuals: Array
    converged: bool
    num_products: int
    eigenvectors: list[list[Array]] | None = None


def hessian_eigenvalues(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    k: int = 1,
    which: str = "largest",
    tol: float = 1e-4,
    max_products: int = 1000,
    return_eigenvectors: bool = False,
    seed: int = 0,
    verbose: int = 0,
    **options: Unpack[OperatorOptions],
) -> Eigenvalues:
    """Some eigenvalues of the Hessian of the compiled loss over a data set.

    By the implicitly restarted Lanczos method of ARPACK (`scipy.sparse.linalg.eigsh`)
    on Hessian-vector products in float64; small matrices, and those of which most
    eigenvalues are wanted, are built and solved whole.

    Args:
        model: As in `hessian_operator`, as are `x` and `y`.
        x: Inputs, or batches of inputs and labels.
        y: Labels.
        k: Number of eigenvalues, >= 1 and at most the number of selected weights.
        which: `"largest"`, `"smallest"` (the most negative) or `"magnitude"`.
        tol: Relative accuracy of the eigenvalues, > 0. Products in float32 hardly
            allow more than 1e-6.
        max_products: Most products to use before giving up, >= 1.
        return_eigenvectors: Whether to return the eigenvectors.
        seed: Of the start vector.
        verbose: 1 to show progress.
        **options: `variables` (defaults to `"last_layer"`), `curvature`,
            `regularizers`, `sample_weight`, `batch_size`, `steps` and `checkpoint`, as
            in `hessian_operator`.

    Returns:
        An `Eigenvalues`. Where not all converged there is a warning, and the others
        are NaN.

    Raises:
        TypeError, ValueError: if an argument is not as described.
        NotImplementedError: if the model cannot be differentiated twice.

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    >>> y = np.zeros((2, 1), "float32")
    >>> result = keras_nrs.flatness.hessian_eigenvalues(model, x, y, k=2)
    >>> result.eigenvalues.round(3), result.converged
    (array([5.303, 1.697]), True)
    """
    k = check_int("k", k, minimum=1)
    check_choice("which", which, _WHICH)
    tol = check_positive("tol", tol)
    max_products = check_int("max_products", max_products, minimum=1)
    check_bool("return_eigenvectors", return_eigenvectors)
    seed = check_seed("seed", seed)
    operator = hessian_operator(model, x, y, **options)
    n = operator.shape[0]
    if k > n:
        raise ValueError(
            f"`k` must be at most the number of selected weights, {n}. Received: k={k}."
        )
    progress = Progress(verbose, None, "product")
    if n <= max(_SMALL, 2 * k + 1):
        values, vectors, converged = _of_whole_matrix(operator, k, which)
    else:
        values, vectors, converged = _by_lanczos(
            _counted(operator, progress),
            k,
            _WHICH[which],
            tol=tol,
            max_products=max_products,
            seed=seed,
        )
    residuals = np.full(k, math.nan)
    found = len(values)
    if found:
        errors = operator.matmat(vectors) - vectors * values
        residuals[:found] = np.linalg.norm(errors, axis=0)
        progress.advance(found)
    progress.finish()
    if not converged:
        warnings.warn(
            f"{k - found} of {k} eigenvalues did not converge to tol={tol:g} in "
            f"{max_products} products. Raise `max_products` or `tol`, unless the "
            "loss itself is not finite.",
            stacklevel=2,
        )
    return Eigenvalues(
        eigenvalues=np.append(values, np.full(k - found, math.nan)),
        residuals=residuals,
        converged=converged,
        num_products=operator.num_products,
        eigenvectors=(
            [operator.as_direction(vector) for vector in vectors.T]
            if return_eigenvectors
            else None
        ),
    )


class _NotFiniteError(Exception):
    """A product is not finite: training has diverged, mostly."""


def _counted(operator: HessianOperator, progress: Progress) -> LinearOperator:
    """The operator, with progress shown at each product."""

    def product(vector: Array) -> Array:
        result = operator.matvec(vector)
        if not np.isfinite(result).all():
            raise _NotFiniteError
        progress.advance()
        return result

    return LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)


def _of_whole_matrix(
    operator: HessianOperator, k: int, which: str
) -> tuple[Array, Array, bool]:
    matrix = operator.to_dense()
    if not np.isfinite(matrix).all():
        return *_nothing(len(matrix)), False
    values, vectors = np.linalg.eigh(matrix)
    order = {
        "largest": np.argsort(-values),
        "smallest": np.argsort(values),
        "magnitude": np.argsort(-np.abs(values)),
    }[which][:k]
    return *_descending(values[order], vectors[:, order]), True


def _by_lanczos(
    operator: LinearOperator,
    k: int,
    which: str,
    *,
    tol: float,
    max_products: int,
    seed: int,
) -> tuple[Array, Array, bool]:
    """Eigenvalues, unit eigenvectors as columns, and whether there are k of them."""
    n = operator.shape[0]
    num_vectors = min(n, max(2 * k + 6, _FEWEST_VECTORS))
    restarts = max(1, (max_products - num_vectors) // (num_vectors - k))
    try:
        values, vectors = eigsh(
            operator,
            k=k,
            which=which,
            tol=tol,
            ncv=num_vectors,
            maxiter=restarts,
            v0=np.random.default_rng(seed).standard_normal(n),
        )
    except ArpackNoConvergence as error:
        return *_descending(error.eigenvalues, error.eigenvectors), False
    except _NotFiniteError:
        return *_nothing(n), False
    except ArpackError:
        # It does not take a matrix of zeros.
        if operator.matvec(np.random.default_rng(seed + 1).standard_normal(n)).any():
            raise
        return np.zeros(k), np.eye(n, k), True
    return *_descending(values, vectors), True


def _nothing(n: int) -> tuple[Array, Array]:
    return np.zeros(0), np.zeros((n, 0))


def _descending(values: Array, vectors: Array) -> tuple[Array, Array]:
    order = np.argsort(-values)
    return values[order], vectors[:, order]
