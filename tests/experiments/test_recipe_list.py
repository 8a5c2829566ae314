"""The list of recipes: words that filter it, and the table."""

import io

import pytest
from rich.console import Console

from keras_nrs.experiments.recipe_list import matching
from keras_nrs.experiments.recipe_list import recipe_table
from keras_nrs.experiments.recipes import recipes

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_all_words_must_be_in_a_name() -> None:
    assert matching([]) == list(recipes())
    names = matching(["cifar100", "VIT"])
    assert names
    assert all("cifar100" in name and "vit" in name for name in names)
    with pytest.raises(ValueError, match=r"`words` must be parts of the name.*mnist2"):
        matching(["mnist2"])


@pytest.mark.parametrize("width", [80, 120])
def test_each_name_is_one_of_each_column(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(recipe_table(list(recipes())))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    shown, data, network = set(), "", ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) < 2 or not cells[-1].startswith(("baseline", "nrs", "rpr")):
            continue
        *firsts, augmentations, schemes = cells
        data = firsts[-2] if len(firsts) == 2 else data
        network = firsts[-1] if firsts else network
        shown |= {
            f"{data}-{network}-{a}-{s}"
            for a in augmentations.split(", ")
            for s in schemes.split(", ")
        }
    assert shown == set(recipes())
