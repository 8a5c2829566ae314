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
# ARPACK checks convergence after this number of products. SciPy's 20 nearly doubles the
# time for the largest eigenvalue, which mostly stands out.
_FEWEST_VECTORS = 12
# Matrices up to this size are built and solved whole.
_LARGEST_DENSE = 24


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Some eigenvalues of a symmetric operator.

    Attributes:
        eigenvalues: Shape `(k,)`, descending, in the unit of the loss per squared
            weight. NaN for each eigenvalue that did not converge.
        residuals: Shape `(k,)`, norms of `H v - eigenvalue * v` for the unit
            eigenvectors v. The operator has an eigenvalue within this distance of each
            reported one.
        converged: Whether all eigenvalues converged to the tolerance.
        num_products: Hessian-vector products used, each of which takes two gradients
            over the data set.
        eigenvectors: `None`, or one eigenvector for each eigenvalue, as a list with an
            array for each trainable variable (0 where not selected), for
            `loss_landscape(directions=...)`.
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

    ARPACK's implicitly restarted Lanczos method (`scipy.sparse.linalg.eigsh`) finds
    them from Hessian-vector products. Small matrices are built and solved whole, as is
    any matrix if about half of its eigenvalues are wanted.

    Args:
        model, x, y: As in `hessian_operator`.
        k: Number of eigenvalues, >= 1 and at most the number of selected weights.
        which: `"largest"`, `"smallest"` (the most negative) or `"magnitude"`.
        tol: Relative accuracy of the eigenvalues, > 0. Products in float32 hardly
            allow less than 1e-6.
        max_products: The search stops after this number of products, >= 1.
        return_eigenvectors: Whether to return the eigenvectors.
        seed: Seed of the start vector.
        verbose: 1 to show progress.
        **options: The keyword arguments of `hessian_operator`, such as `variables`.

    Returns:
        An `Eigenvalues`. Eigenvalues that did not converge are NaN, with a warning.

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
    if n <= max(_LARGEST_DENSE, 2 * k + 1):
        values, vectors, converged = _by_dense_solver(operator, k, which)
    else:
        values, vectors, converged = _by_lanczos(
            _with_progress(operator, progress),
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
    """A product is not finite, mostly because training has diverged."""


def _with_progress(operator: HessianOperator, progress: Progress) -> LinearOperator:
    """The operator, which shows progress at each product."""

    def product(vector: Array) -> Array:
        result = operator.matvec(vector)
        if not np.isfinite(result).all():
            raise _NotFiniteError
        progress.advance()
        return result

    return LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)


def _by_dense_solver(
    operator: HessianOperator, k: int, which: str
) -> tuple[Array, Array, bool]:
    matrix = operator.to_dense()
    if not np.isfinite(matrix).all():
        return *_no_eigenvalues(len(matrix)), False
    values, vectors = np.linalg.eigh(matrix)
    order = {
        "largest": np.argsort(-values),
        "smallest": np.argsort(values),
        "magnitude": np.argsort(-np.abs(values)),
    }[which][:k]
    return *_sorted_descending(values[order], vectors[:, order]), True


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
        return *_sorted_descending(error.eigenvalues, error.eigenvectors), False
    except _NotFiniteError:
        return *_no_eigenvalues(n), False
    except ArpackError:
        # ARPACK fails on a matrix of zeros.
        if operator.matvec(np.random.default_rng(seed + 1).standard_normal(n)).any():
            raise
        return np.zeros(k), np.eye(n, k), True
    return *_sorted_descending(values, vectors), True


def _no_eigenvalues(n: int) -> tuple[Array, Array]:
    return np.zeros(0), np.zeros((n, 0))


def _sorted_descending(values: Array, vectors: Array) -> tuple[Array, Array]:
    order = np.argsort(-values)
    return values[order], vectors[:, order]
