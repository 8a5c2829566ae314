"""The numbers of the paper's tables."""

import pytest

from keras_nrs.experiments import published
from keras_nrs.experiments.recipes import recipes

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_published_numbers() -> None:
    # 7 networks x 4 columns x 3 schemes, and 3 networks x 2 schemes.
    assert len(published.ACCURACY) == 7 * 4 * 3 + 3 * 2
    for cell, text in {
        ("cifar10", "vgg16", "basic", "baseline"): "93.12 ± 0.08",
        ("cifar100", "pyramidnet_164_270", "cutout", "nrs"): "86.29 ± 0.18",
        ("cifar100", "vit_b", "heavy", "rpr"): "72.35 ± 0.17",
        ("cifar10", "vit_ti", "heavy", "nrs"): "90.47 ± 0.14",
        ("imagenet2012", "imagenet_vgg16", "flip", "nrs"): "73.52 ± 0.09",
    }.items():
        assert str(published.ACCURACY[cell]) == text
    assert published.ACCURACY.keys() < {
        (r.dataset, r.network, r.augmentation, r.scheme) for r in recipes().values()
    }
    key = "imagenet2012", "imagenet_resnet101", "flip", "baseline"
    assert str(published.TOP_5_ACCURACY[key]) == "93.91 ± 0.07"
