"""The configurations of the tables' cells."""

import dataclasses
from typing import Any

import pytest

from keras_nrs.experiments.recipes import Recipe
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_settings

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_every_cell_of_the_tables_has_a_recipe() -> None:
    by_set: dict[str, int] = {}
    for recipe in recipes().values():
        by_set[recipe.dataset] = by_set.get(recipe.dataset, 0) + 1
    # Table 1: 4 networks with 2 augmentations and 3 with 2, 3 schemes. Table 2: 3
    # networks and 2 schemes.
    assert by_set == {
        "cifar10": 42,
        "cifar100": 42,
        "imagenet2012": 6,
        "digits": 3,
        "fashion_mnist": 18,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cifar10-wide_resnet_28_10-cutout-nrs",
            {
                "optimizer": "sgd",
                "epochs": 200,
                "source": "released",
                "clip_norm": 2.0,
                "eps": 0.1,
                "alpha": 1.0,
                "perturbation": "released",
                "seeds": (0, 1, 2),
                "flatness": True,
            },
        ),
        (
            "cifar100-vit_s-heavy-rpr",
            {
                "optimizer": "adam",
                "learning_rate": 2e-4,
                "weight_decay": 0.03,
                "batch_size": 256,
                "epochs": 1200,
                "clip_norm": 2.0,
            },
        ),
        (
            "imagenet2012-imagenet_resnet50-flip-baseline",
            {
                "batch_size": 512,
                "learning_rate": 0.2,
                "weight_decay": 1e-4,
                "label_smoothing": 0.1,
                "epochs": 100,
                "image_size": 224,
            },
        ),
    ],
)
def test_recipes_are_the_papers(name: str, expected: dict[str, Any]) -> None:
    found = dataclasses.asdict(recipes()[name])
    assert {key: found[key] for key in expected} == expected


def test_a_source_brings_its_clipping_and_perturbation() -> None:
    for name, recipe in recipes().items():
        paper = with_settings(recipe, ["source=paper"])
        assert (paper.source, paper.clip_norm) == ("paper", None), name
        assert paper.perturbation == "ball", name
    assert with_settings(paper, ["source=released"]).clip_norm == 2.0
    given = with_settings(Recipe(), ["clip_norm=5", "source=paper"])
    assert (given.clip_norm, given.perturbation) == (5, "ball")
    assert given.data_settings()["source"] == "paper"


def test_settings_replace_values() -> None:
    recipe = with_settings(
        Recipe(), ["eps=0.5", "scheme=rpr", "seeds=3,4", "clip_norm=None"]
    )
    assert (recipe.eps, recipe.scheme, recipe.seeds) == (0.5, "rpr", (3, 4))
    assert recipe.clip_norm is None
    assert with_settings(recipe, ["seeds=7"]).seeds == (7,)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("source=[1]", "`source` must be one of"),
        ("epz=1", "'epz=1'. Similar keys: eps"),
        ("nonsense=1", "'nonsense=1'. The keys: source, network, "),
        ("eps", "must be key=value"),
        ("eps=many", "`eps` must be a number"),
        ("network=alexnet", "`network` must be one of"),
        ("epochs=0", "`epochs`.*epochs=0"),
        ("warmup_epochs=500", "`warmup_epochs`.*500"),
        ("seeds=0,0", "different integers"),
        ("seeds=()", r"seeds=\(\)"),
        ("dtype_policy=half", "`dtype_policy`.*'half'"),
        ("dtype_policy=None", "`dtype_policy`.*None"),
        ("perturbation=cube", "`perturbation` must be one of"),
    ],
)
def test_bad_settings_are_named(setting: str, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        with_settings(Recipe(), [setting])
