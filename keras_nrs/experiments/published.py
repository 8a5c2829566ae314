"""The numbers of the paper's tables, for comparison.

Reference: Zhao and Zhang (2022), https://arxiv.org/abs/2201.06064
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

SCHEMES = ("baseline", "rpr", "nrs")


class Published(NamedTuple):
    """Mean, and standard deviation over three seeds if the paper gives it."""

    mean: float
    spread: float | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:.2f}{spread}"


NETWORK_NAMES = {
    "vgg16": "VGG16",
    "resnet18": "ResNet18",
    "wide_resnet_28_10": "WideResNet-28-10",
    "pyramidnet_164_270": "PyramidNet-164",
    "vit_ti": "ViT-Ti16",
    "vit_s": "ViT-S16",
    "vit_b": "ViT-B16",
    "imagenet_vgg16": "VGG16",
    "imagenet_resnet50": "ResNet50",
    "imagenet_resnet101": "ResNet101",
}

# Columns: CIFAR-10 basic and cutout (ViTs: heavy), CIFAR-100 basic and cutout (heavy).
_TABLE_1 = """
vgg16 baseline              93.12 0.08  93.95 0.11  72.28 0.17  73.34 0.22
vgg16 rpr                   93.14 0.21  93.91 0.17  72.31 0.21  73.29 0.19
vgg16 nrs                   93.79 0.11  94.77 0.17  73.61 0.20  75.32 0.19
resnet18 baseline           94.88 0.12  95.45 0.16  76.19 0.21  77.03 0.11
resnet18 rpr                94.90 0.24  95.41 0.23  76.25 0.31  76.98 0.18
resnet18 nrs                95.84 0.15  96.47 0.10  78.67 0.17  79.88 0.14
wide_resnet_28_10 baseline  96.17 0.12  97.09 0.17  80.91 0.13  82.25 0.15
wide_resnet_28_10 rpr       96.14 0.11  97.02 0.15  80.94 0.19  82.19 0.24
wide_resnet_28_10 nrs       96.94 0.17  97.55 0.13  82.77 0.16  83.94 0.16
pyramidnet_164_270 baseline 96.32 0.15  97.11 0.12  82.33 0.19  83.50 0.17
pyramidnet_164_270 rpr      96.31 0.19  97.09 0.19  82.25 0.24  83.58 0.22
pyramidnet_164_270 nrs      97.23 0.19  97.72 0.11  84.61 0.24  86.29 0.18
vit_ti baseline             83.07 0.08  89.22 0.18  60.12 0.15  65.44 0.20
vit_ti rpr                  83.02 0.13  89.28 0.14  60.18 0.21  65.21 0.17
vit_ti nrs                  84.17 0.09  90.47 0.14  61.29 0.13  66.84 0.22
vit_s baseline              85.14 0.11  92.49 0.09  61.83 0.20  72.40 0.17
vit_s rpr                   85.17 0.13  92.12 0.11  61.92 0.14  72.33 0.17
vit_s nrs                   85.86 0.10  93.55 0.16  62.59 0.17  73.17 0.14
vit_b baseline              88.42 0.12  91.54 0.11  63.49 0.17  72.32 0.21
vit_b rpr                   88.39 0.14  91.57 0.12  63.38 0.15  72.35 0.17
vit_b nrs                   89.09 0.08  92.23 0.14  64.46 0.17  73.11 0.13
"""
# Columns: top-1, top-5.
_TABLE_2 = """
imagenet_vgg16 baseline     73.11 0.08  91.12 0.08
imagenet_vgg16 nrs          73.52 0.09  91.39 0.09
imagenet_resnet50 baseline  75.45 0.15  93.04 0.07
imagenet_resnet50 nrs       76.29 0.13  93.53 0.10
imagenet_resnet101 baseline 77.15 0.11  93.91 0.07
imagenet_resnet101 nrs      78.02 0.10  94.44 0.08
"""

Cell = tuple[str, str, str, str]


def _rows(table: str) -> Iterator[tuple[str, str, list[Published]]]:
    """Network, scheme and numbers of each row."""
    for line in table.strip().splitlines():
        network, scheme, *words = line.split()
        numbers = list(map(float, words))
        yield network, scheme, list(map(Published, numbers[::2], numbers[1::2]))


def _table_1() -> dict[Cell, Published]:
    cells = {}
    for network, scheme, values in _rows(_TABLE_1):
        stronger = "heavy" if network.startswith("vit") else "cutout"
        columns = product(("cifar10", "cifar100"), ("basic", stronger))
        for (dataset, augmentation), value in zip(columns, values, strict=True):
            cells[dataset, network, augmentation, scheme] = value
    return cells


def _table_2(column: int) -> dict[Cell, Published]:
    return {
        ("imagenet2012", network, "flip", scheme): values[column]
        for network, scheme, values in _rows(_TABLE_2)
    }


# Accuracies in percent, by data set, network, augmentation and scheme.
ACCURACY = _table_1() | _table_2(0)
TOP_5_ACCURACY = _table_2(1)
# Eigenvalues of the last layer. The paper does not say with which augmentation.
EIGENVALUE: dict[Cell, Published] = {
    ("cifar10", "wide_resnet_28_10", augmentation, scheme): Published(value)
    for augmentation in ("basic", "cutout")
    for scheme, value in zip(SCHEMES, (49.15, 51.79, 12.42), strict=True)
}
