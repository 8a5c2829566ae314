"""The names of schemes and perturbations, which can be checked without Keras."""

PAPER_SCHEMES = ("nrs", "rpr", "baseline")
SCHEMES = (*PAPER_SCHEMES, "sam", "asam")
PERTURBATIONS = (
    "ball",
    "relative",
    "layerwise",
    "filterwise",
    "elementwise",
    "released",
    "ascent",
    "adaptive_ascent",
)
# The perturbations of schemes that take no other.
OWN_PERTURBATIONS = {"sam": "ascent", "asam": "adaptive_ascent"}


def check_own_perturbation(scheme: str, name: str | None, received: str) -> None:
    """Raise an error if a scheme that has its own perturbation gets another one.

    Args:
        scheme: One of `SCHEMES`.
        name: One of `PERTURBATIONS`, or `None` for a class that is not among them.
        received: The perturbation in the words of the error.
    """
    own = OWN_PERTURBATIONS.get(scheme, name)
    if name != own:
        raise ValueError(
            f"`perturbation` must not be given with scheme={scheme!r}, whose own is "
            f"{own!r}. Received: perturbation={received}. Leave it out, pass {own!r}, "
            "or take scheme='rpr'."
        )
