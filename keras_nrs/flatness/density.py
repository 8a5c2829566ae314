"""The spectral density of the Hessian."""

import os
from dataclasses import dataclass
from typing import Any
from typing import Unpack

import keras
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from keras_nrs._checks import check_int
from keras_nrs._checks import check_positive
from keras_nrs._checks import check_seed
from keras_nrs._signatures import with_options_of
from keras_nrs.flatness import plots
from keras_nrs.flatness.operator import HessianOperator
from keras_nrs.flatness.operator import OperatorOptions
from keras_nrs.flatness.operator import hessian_operator
from keras_nrs.flatness.progress import Progress

Array = NDArray[Any]

# Lanczos has found an invariant subspace if less than this share of a vector is new.
_INVARIANT = 1e-7


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """An estimate of how the eigenvalues of an operator are distributed.

    The density is a mixture of points with the weight `weights[i, j]` at `nodes[i, j]`,
    averaged over the rows. Each row comes from one random vector.

    Attributes:
        nodes: Shape `(num_samples, num_steps)`, in the unit of the loss per squared
            weight.
        weights: The same shape; each row sums to 1.
        size: Number of eigenvalues.
        num_products: Hessian-vector products used.
    """

    nodes: Array
    weights: Array
    size: int
    num_products: int

    def moment(self, order: int) -> tuple[float, float]:
        """The mean of the eigenvalues to a power, and its standard error.

        The first moment times `size` estimates the trace. Moments below
        `2 * num_steps` are exact for each random vector.
        """
        order = check_int("order", order, minimum=0)
        samples = np.sum(self.weights * self.nodes**order, axis=1)
        spread = np.std(samples, ddof=1) if len(samples) > 1 else np.nan
        return float(np.mean(samples)), float(spread / np.sqrt(len(samples)))

    def density(self, points: Array, *, bandwidth: float) -> Array:
        """The density at given points, each node smoothed to a normal distribution.

        Args:
            points: Shape `(m,)`.
            bandwidth: Standard deviation of the normal distributions, > 0.

        Returns:
            Shape `(m,)`, with an integral of 1.
        """
        bandwidth = check_positive("bandwidth", bandwidth)
        z = (np.asarray(points)[:, None] - self.nodes.ravel()) / bandwidth
        kernels = np.exp(-0.5 * z**2) / (bandwidth * np.sqrt(2 * np.pi))
        return kernels @ self.weights.ravel() / len(self.nodes)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        bandwidth: float | None = None,
        ax: Any = None,
        show: bool = False,
    ) -> Any:
        """Draw the density, on a logarithmic scale.

        Args:
            path: Path of an image to write, in PNG or another format of matplotlib.
            bandwidth: As in `density()`. Defaults to 1 % of the range of the nodes.
            ax: Axes of matplotlib to draw in. Defaults to a new figure.
            show: Whether to show the figure, as `matplotlib.pyplot.show()` does.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        return plots.draw_densities(
            {"": self}, path, bandwidth=bandwidth, ax=ax, show=show
        )


@with_options_of(hessian_operator)
def hessian_density(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_samples: int = 4,
    num_steps: int = 40,
    seed: int = 0,
    verbose: int = 0,
    **options: Unpack[OperatorOptions],
) -> SpectralDensity:
    """The spectral density of the Hessian, by stochastic Lanczos quadrature.

    Args:
        model, x, y: As in `hessian_operator`.
        num_samples: Number of random vectors, >= 1.
        num_steps: Lanczos steps for each vector, >= 2, each of which takes one
            Hessian-vector product and keeps one vector in memory. More steps resolve
            more of the spectrum.
        seed: Seed of the random vectors.
        verbose: 1 to show progress.
        **options: The keyword arguments of `hessian_operator`, such as `variables`.

    Returns:
        A `SpectralDensity`, which has a method `plot()`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
        NotImplementedError: if the model cannot be differentiated twice.

    References:
        [Ubaru et al., 2017](https://doi.org/10.1137/16M1104974);
        [Ghorbani et al., 2019](https://arxiv.org/abs/1901.10159).

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    >>> y = np.zeros((2, 1), "float32")
    >>> density = keras_nrs.flatness.hessian_density(model, x, y)
    >>> round(float(density.nodes.max()), 3)
    5.303
    """
    num_samples = check_int("num_samples", num_samples, minimum=1)
    num_steps = check_int("num_steps", num_steps, minimum=2)
    rng = np.random.default_rng(check_seed("seed", seed))
    operator = hessian_operator(model, x, y, **options)
    num_steps = min(num_steps, operator.shape[0])
    progress = Progress(verbose, num_samples * num_steps, "product")
    nodes = np.zeros((num_samples, num_steps))
    weights = np.zeros((num_samples, num_steps))
    for row in range(num_samples):
        start = rng.choice([-1.0, 1.0], operator.shape[0])
        diagonal, off_diagonal = _lanczos(operator, start, num_steps, progress)
        values, vectors = eigh_tridiagonal(diagonal, off_diagonal)
        nodes[row, : len(values)] = values
        weights[row, : len(values)] = vectors[0] ** 2
    progress.finish()
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        size=operator.shape[0],
        num_products=operator.num_products,
    )


def _lanczos(
    operator: HessianOperator, start: Array, num_steps: int, progress: Progress
) -> tuple[Array, Array]:
    """Diagonal and off-diagonal of the tridiagonal matrix of a Krylov space.

    Lanczos with full reorthogonalization, which ends early if the space is invariant.
    """
    basis = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for step in range(num_steps):
        product = operator.matvec(basis[-1])
        if not np.isfinite(product).all():
            raise ValueError(
                "`model` must have a finite Hessian. Received: a model named "
                f"{operator.model.name!r} with Hessian-vector products that are not "
                "finite. Its training has probably diverged."
            )
        progress.advance()
        diagonal.append(float(basis[-1] @ product))
        known = np.stack(basis)
        rest = product
        # Twice is enough to make the rest orthogonal to rounding.
        for _ in range(2):
            rest = rest - known.T @ (known @ rest)
        norm = float(np.linalg.norm(rest))
        is_last = step == num_steps - 1
        if is_last or norm <= _INVARIANT * np.linalg.norm(diagonal + off_diagonal):
            break
        off_diagonal.append(norm)
        basis.append(rest / norm)
    return np.array(diagonal), np.array(off_diagonal)
