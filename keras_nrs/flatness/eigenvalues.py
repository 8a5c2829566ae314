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
from keras_nrs._signatures import with_options_of
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
# Rounding may leave residuals of this share of the Hessian's norm. Several of Keras's
# operations round float64 to float32.
_ROUNDING = {"float32": 1e-4, "float64": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Some eigenvalues of a symmetric operator.

    Attributes:
        eigenvalues: Shape `(k,)`, descending, in the unit of the loss per squared
            weight. NaN for each eigenvalue that was not found.
        residuals: Shape `(k,)`, norms of `H v - eigenvalue * v` for the unit
            eigenvectors v. The operator has an eigenvalue within this distance of each
            reported one.
        converged: Whether there are k eigenvalues, and the measured residuals are
            within the tolerance or what rounding leaves: `tol * abs(eigenvalue)` plus
            1e-4 of the Hessian's norm (1e-6 in float64).
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


@with_options_of(hessian_operator)
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
        max_products: The search stops after this number of products, >= 1, but not
            before its first restart: at `2 * max(2 * k + 6, 12) - k` or so. A matrix
            that is built whole takes one for each of its columns.
        return_eigenvectors: Whether to return the eigenvectors.
        seed: Seed of the start vector.
        verbose: 1 to show progress.
        **options: The keyword arguments of `hessian_operator`, such as `variables`.

    Returns:
        An `Eigenvalues`. Eigenvalues that were not found are NaN, with a warning.
        There is a warning for residuals that are too large, too.

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
    k, tol, max_products, seed = check_eigenvalue_options(
        k,
        which=which,
        tol=tol,
        max_products=max_products,
        return_eigenvectors=return_eigenvectors,
        seed=seed,
    )
    operator = hessian_operator(model, x, y, **options)
    n = operator.shape[0]
    if k > n:
        raise ValueError(
            f"`k` must be at most the number of selected weights, {n}. Received: k={k}."
        )
    progress = Progress(verbose, None, "product")
    if n <= max(_LARGEST_DENSE, 2 * k + 1):
        values, vectors, norm = _by_dense_solver(operator, k, which)
    else:
        search = _Search(operator, progress)
        values, vectors = _by_lanczos(
            search, k, _WHICH[which], tol=tol, max_products=max_products, seed=seed
        )
        norm = search.norm
    residuals = np.full(k, math.nan)
    found = len(values)
    if found:
        errors = operator.matmat(vectors) - vectors * values
        residuals[:found] = np.linalg.norm(errors, axis=0)
        progress.advance(found)
    progress.finish()
    allowed = tol * np.abs(values) + _ROUNDING[operator.precision] * norm
    too_large = residuals[:found] > allowed
    if found < k:
        warnings.warn(
            f"{k - found} of {k} eigenvalues did not converge to tol={tol:g} in "
            f"{max_products} products. Raise `max_products` or `tol`, unless the "
            "loss itself is not finite.",
            stacklevel=2,
        )
    elif too_large.any():
        warnings.warn(
            f"{too_large.sum()} of {k} eigenvalues have residuals above tol={tol:g}, "
            f"up to {residuals.max():.3g}: products with the Hessian are not exact, or "
            "not the same at each pass. The usual causes are layers that draw random "
            "numbers in inference mode, and matrix products in TF32 on a GPU.",
            stacklevel=2,
        )
    return Eigenvalues(
        eigenvalues=np.append(values, np.full(k - found, math.nan)),
        residuals=residuals,
        converged=found == k and not too_large.any(),
        num_products=operator.num_products,
        eigenvectors=(
            [operator.as_direction(vector) for vector in vectors.T]
            if return_eigenvectors
            else None
        ),
    )


def check_eigenvalue_options(
    k: int,
    *,
    which: str = "largest",
    tol: float = 1e-4,
    max_products: int = 1000,
    return_eigenvectors: bool = False,
    seed: int = 0,
    verbose: int = 0,
) -> tuple[int, float, int, int]:
    """`k`, `tol`, `max_products` and `seed` of `hessian_eigenvalues`, or an error."""
    check_choice("which", which, _WHICH)
    check_bool("return_eigenvectors", return_eigenvectors)
    return (
        check_int("k", k, minimum=1),
        check_positive("tol", tol),
        check_int("max_products", max_products, minimum=1),
        check_seed("seed", seed),
    )


class _NotFiniteError(Exception):
    """A product is not finite, mostly because training has diverged."""


class _Search(LinearOperator):  # type: ignore[misc]
    """An operator that shows progress at each product.

    Attributes:
        norm: A lower bound of its norm, from the products so far.
    """

    def __init__(self, operator: HessianOperator, progress: Progress) -> None:
        super().__init__(operator.dtype, operator.shape)
        self._operator = operator
        self._progress = progress
        self.norm = 0.0

    def _matvec(self, vector: Array) -> Array:
        result: Array = self._operator.matvec(vector)
        if not np.isfinite(result).all():
            raise _NotFiniteError
        norms = np.linalg.norm(result), np.linalg.norm(vector)
        self.norm = max(self.norm, float(norms[0] / norms[1]))
        self._progress.advance()
        return result


def _by_dense_solver(
    operator: HessianOperator, k: int, which: str
) -> tuple[Array, Array, float]:
    """Eigenvalues, unit eigenvectors as columns, and the norm of the matrix."""
    matrix = operator.to_dense()
    if not np.isfinite(matrix).all():
        return *_no_eigenvalues(len(matrix)), math.nan
    values, vectors = np.linalg.eigh(matrix)
    order = {
        "largest": np.argsort(-values),
        "smallest": np.argsort(values),
        "magnitude": np.argsort(-np.abs(values)),
    }[which][:k]
    norm = float(np.abs(values).max())
    return *_sorted_descending(values[order], vectors[:, order]), norm


def _by_lanczos(
    operator: LinearOperator,
    k: int,
    which: str,
    *,
    tol: float,
    max_products: int,
    seed: int,
) -> tuple[Array, Array]:
    """At most k eigenvalues, and unit eigenvectors as columns."""
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
        return _sorted_descending(error.eigenvalues, error.eigenvectors)
    except _NotFiniteError:
        return _no_eigenvalues(n)
    except ArpackError:
        # ARPACK fails on a matrix of zeros.
        if operator.matvec(np.random.default_rng(seed + 1).standard_normal(n)).any():
            raise
        return np.zeros(k), np.eye(n, k)
    return _sorted_descending(values, vectors)


def _no_eigenvalues(n: int) -> tuple[Array, Array]:
    return np.zeros(0), np.zeros((n, 0))


def _sorted_descending(values: Array, vectors: Array) -> tuple[Array, Array]:
    order = np.argsort(-values)
    return values[order], vectors[:, order]
