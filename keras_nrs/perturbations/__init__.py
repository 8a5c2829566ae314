"""Distributions of the weight perturbation delta."""

from keras_nrs._schemes import PERTURBATIONS
from keras_nrs.perturbations.ascent import AdaptiveAscent as AdaptiveAscent
from keras_nrs.perturbations.ascent import Ascent as Ascent
from keras_nrs.perturbations.balls import Ball as Ball
from keras_nrs.perturbations.balls import FilterwiseBall as FilterwiseBall
from keras_nrs.perturbations.balls import LayerwiseBall as LayerwiseBall
from keras_nrs.perturbations.balls import RelativeBall as RelativeBall
from keras_nrs.perturbations.deltas import add_deltas as add_deltas
from keras_nrs.perturbations.deltas import sample_deltas as sample_deltas
from keras_nrs.perturbations.perturbation import Perturbation as Perturbation
from keras_nrs.perturbations.random_noise import NOISES as NOISES
from keras_nrs.perturbations.random_noise import RADII as RADII
from keras_nrs.perturbations.random_noise import norm as norm
from keras_nrs.perturbations.random_noise import random_stream as random_stream
from keras_nrs.perturbations.scaled_noise import ElementwiseNoise as ElementwiseNoise
from keras_nrs.perturbations.scaled_noise import ReleasedCode as ReleasedCode

_CLASSES = (
    Ball,
    RelativeBall,
    LayerwiseBall,
    FilterwiseBall,
    ElementwiseNoise,
    ReleasedCode,
    Ascent,
    AdaptiveAscent,
)
NAMES: dict[str, type[Perturbation]] = dict(zip(PERTURBATIONS, _CLASSES, strict=True))


def get_perturbation(identifier: str | Perturbation) -> Perturbation:
    """The perturbation of a name, or `identifier` if it is a `Perturbation`."""
    if isinstance(identifier, Perturbation):
        return identifier
    if not isinstance(identifier, str) or identifier not in NAMES:
        raise ValueError(
            f"`perturbation` must be one of {list(NAMES)} or an instance, not the "
            "class, of a keras_nrs.perturbations.Perturbation. Received: "
            f"perturbation={identifier!r}."
        )
    return NAMES[identifier]()
