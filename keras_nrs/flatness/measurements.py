"""What `keras-nrs flatness` measures, and how."""

from dataclasses import dataclass

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of all measurements, the same for all models.

    Args:
        variables: `"last_layer"` or `"all"`: the weights of the Hessian.
        k: Number of eigenvalues, >= 1.
        eps: Size of the perturbations, >= 0: for the divergence relative to the norm
            of the weights, for the increase of the loss to that of each filter.
        points: Points along each of the two directions of the landscape, >= 2.
        batch_size: Samples in a batch, >= 1.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    variables: str = "last_layer"
    k: int = 1
    eps: float = 0.1
    points: int = 21
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_choice("variables", self.variables, ("last_layer", "all"))
        check_int("k", self.k, minimum=1)
        check_nonnegative("eps", self.eps)
        check_int("points", self.points, minimum=2)
        check_int("batch_size", self.batch_size, minimum=1)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The measurements of one model. Pairs are a mean and its standard error.

    Increases of the loss come with both ends of their 95 % intervals.

    `chance_loss` is the loss with the labels in random order. Neither it nor the loss
    of the data, `data_loss`, has weight penalties, which `loss` has.
    """

    loss: float
    data_loss: float
    chance_loss: float
    accuracy: float | None
    divergence: tuple[float, float]
    mean_increase: tuple[float, float, float]
    largest_increase: tuple[float, float, float]
    eigenvalues: list[float]
    converged: bool
    trace: tuple[float, float]
