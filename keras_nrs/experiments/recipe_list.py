"""The names of the recipes, by the words in them, and as a table."""

from collections.abc import Iterable
from collections.abc import Sequence

from rich import box
from rich.table import Table

from keras_nrs.experiments.recipes import recipes

_ORDER = ("baseline", "rpr", "nrs")
PARTS = ("data", "network", "augmentation", "scheme")


def matching(words: Iterable[str]) -> list[str]:
    """The names of recipes that have all words in them.

    Raises:
        ValueError: if there is none.
    """
    words = [word.lower() for word in words]
    names = [name for name in recipes() if all(word in name for word in words)]
    if not names:
        raise ValueError(
            f"`words` must be parts of the name of a recipe, such as 'cifar10', 'vit' "
            f"and 'heavy'. Received: {words}."
        )
    return names


def recipe_table(names: Sequence[str]) -> Table:
    """A row for each data set and network, with its augmentations and schemes.

    The name of a recipe is a value of each column, joined by `-`.
    """
    # Data set, network and augmentation, with the schemes.
    cells: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name in names:
        data, network, augmentation, scheme = name.split("-")
        of_network = cells.setdefault(data, {}).setdefault(network, {})
        of_network.setdefault(augmentation, []).append(scheme)
    table = Table(
        title=f"{len(names)} recipes",
        caption="A name is one of each column: DATA-NETWORK-AUGMENTATION-SCHEME.",
        box=box.SIMPLE,
    )
    for part in PARTS:
        table.add_column(part)
    for data, networks in cells.items():
        for network, augmentations in networks.items():
            for of_row in _rows(augmentations):
                table.add_row(data, network, *of_row)
                data = network = ""
    return table


def _rows(augmentations: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Augmentations that have the same schemes, together."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for augmentation, schemes in augmentations.items():
        ordered = tuple(sorted(schemes, key=_ORDER.index))
        rows.setdefault(ordered, []).append(augmentation)
    return [(", ".join(names), ", ".join(schemes)) for schemes, names in rows.items()]
