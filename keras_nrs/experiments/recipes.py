"""Every cell of the paper's tables as the configuration of a training.

Recipes are those of the authors' released code, which made the published numbers.
Where the paper's text differs, `source="paper"` follows it. Nothing here imports Keras,
which takes seconds, before it must: commands check recipes first.
"""

import ast
import dataclasses
import difflib
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING
from typing import Any

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._checks import check_int
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_positive
from keras_nrs._checks import check_seed
from keras_nrs._files import expect_object
from keras_nrs._image_settings import check_image_settings
from keras_nrs._schemes import PAPER_SCHEMES
from keras_nrs._schemes import PERTURBATIONS
from keras_nrs._schemes import SCHEMES
from keras_nrs._schemes import check_own_perturbation

if TYPE_CHECKING:
    from keras_nrs.step.options import StepArguments


def _network(name: str, **options: Any) -> Callable[..., Any]:
    """A function of `keras_nrs.models`, which is imported at the call."""

    def make(*args: Any) -> Any:
        from keras_nrs import models

        return getattr(models, name)(*args, **options)

    return make


# Functions of the image shape and the number of classes.
NETWORKS: dict[str, Callable[..., Any]] = {
    "vgg16": _network("vgg16"),
    "resnet18": _network("resnet18"),
    "wide_resnet_28_10": _network("wide_resnet"),
    "wide_resnet_16_4": _network("wide_resnet", depth=16, width=4),
    "wide_resnet_10_1": _network("wide_resnet", depth=10, width=1),
    "pyramidnet_164_270": _network("pyramidnet"),
    "pyramidnet_164_48": _network("pyramidnet", widening=48),
    "vit_ti": _network("vit", size="ti"),
    "vit_s": _network("vit", size="s"),
    "vit_b": _network("vit", size="b"),
    "imagenet_vgg16": _network("imagenet_vgg16"),
    "imagenet_resnet50": _network("imagenet_resnet50"),
    "imagenet_resnet101": _network("imagenet_resnet101"),
}
# The networks of the released code, where they are others.
RELEASED_NETWORKS: dict[str, Callable[..., Any]] = {
    "vgg16": _network("vgg16", batch_norm=False),
    "vit_ti": _network("vit", size="ti", dropout=0.1),
    "vit_s": _network("vit", size="s", dropout=0.1),
    "vit_b": _network("vit", size="b", dropout=0.1),
}
# The values of other keys that belong to a source.
SOURCES: dict[str, dict[str, Any]] = {
    "paper": {"clip_norm": None, "perturbation": "ball"},
    # The gradient is clipped at 5, and by the optimizer at 2.
    "released": {"clip_norm": 2.0, "perturbation": "released"},
}
# Values of recipes in files of version 0.1.0, which have no such keys.
VALUES_OF_OLD_FILES = {"source": "paper"}
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configuration of one cell of a table.

    Args:
        source: `"released"`, the authors' code, or `"paper"`, its text. Says which
            network `"vgg16"` is, whether ViTs have dropout, and whether all weights
            decay or kernels alone; and as in `ImageData`.
        network: One of `NETWORKS`.
        dataset, augmentation, image_size, label_smoothing, validation_percent,
            batch_size: As in `keras_nrs.data.ImageData`. Without a validation split
            (0, as in the paper) each epoch logs the test accuracy. Nothing is chosen
            by it: the last epoch's counts.
        epochs: Passes over the training images, >= 1.
        steps_per_epoch: Training steps in an epoch, fewer to try a recipe out; `None`
            uses all training images.
        optimizer: `"sgd"` (Nesterov momentum 0.9) or `"adam"`.
        learning_rate: Learning rate after the warmup; a cosine takes it to 0.
        warmup_epochs: Epochs in which the learning rate grows linearly from 0, >= 0.
        weight_decay: Decay of the weights, >= 0. `"sgd"` adds it to the loss (coupled),
            `"adam"` multiplies it by the learning rate (decoupled).
        clip_norm: Global norm at which gradients are clipped, > 0 or `None`.
        scheme, eps, alpha, perturbation, interval, normalize: As in `wrap()`.
        dtype_policy: Policy of the network's layers, such as `"mixed_bfloat16"`.
        seeds: Seeds, one for each training. A seed determines initial weights, order,
            augmentation, dropout and perturbations.
        flatness: Whether to measure the last layer's Hessian eigenvalues at the end, on
            the training images.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    source: str = "released"
    network: str = "wide_resnet_28_10"
    dataset: str = "cifar10"
    augmentation: str = "basic"
    image_size: int | None = None
    label_smoothing: float = 0.0
    validation_percent: int = 0
    batch_size: int = 128
    epochs: int = 200
    steps_per_epoch: int | None = None
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    warmup_epochs: int = 0
    weight_decay: float = 5e-4
    clip_norm: float | None = 2.0
    scheme: str = "nrs"
    eps: float = 0.1
    alpha: float = 1.0
    perturbation: str = "released"
    interval: int = 1
    normalize: bool = False
    dtype_policy: str = "float32"
    seeds: tuple[int, ...] = (0, 1, 2)
    flatness: bool = False

    def __post_init__(self) -> None:
        check_choice("source", self.source, SOURCES)
        check_choice("network", self.network, NETWORKS)
        if not isinstance(self.dataset, str):
            raise TypeError(
                "`dataset` must be the name of a data set in TensorFlow Datasets. "
                f"Received: dataset={self.dataset!r}."
            )
        settings = self.data_settings()
        del settings["name"]
        check_image_settings(**settings)
        check_int("epochs", self.epochs, minimum=1)
        if self.steps_per_epoch is not None:
            check_int("steps_per_epoch", self.steps_per_epoch, minimum=1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive("learning_rate", self.learning_rate)
        check_int("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        check_nonnegative("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_choice("scheme", self.scheme, SCHEMES)
        check_nonnegative("eps", self.eps)
        check_nonnegative("alpha", self.alpha)
        check_choice("perturbation", self.perturbation, PERTURBATIONS)
        check_own_perturbation(self.scheme, self.perturbation, repr(self.perturbation))
        check_int("interval", self.interval, minimum=1)
        check_bool("normalize", self.normalize)
        if not _is_dtype_policy(self.dtype_policy):
            raise ValueError(
                "`dtype_policy` must be the name of a Keras dtype policy, such as "
                f"'mixed_bfloat16'. Received: dtype_policy={self.dtype_policy!r}."
            )
        is_tuple = isinstance(self.seeds, tuple) and len(self.seeds) > 0
        if not is_tuple or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                "`seeds` must be a tuple of at least one, and of different integers. "
                f"Received: seeds={self.seeds!r}."
            )
        for seed in self.seeds:
            check_seed("seeds", seed)
        check_bool("flatness", self.flatness)

    def step_arguments(self) -> "StepArguments":
        """The options of `wrap()`, without eps and alpha."""
        return {
            "scheme": self.scheme,
            # The paper's tables compare divergences, and accuracies at theta.
            "clean_pass": self.scheme == "rpr",
            "perturbation": self.perturbation,
            "interval": self.interval,
            "normalize": self.normalize,
        }

    def data_settings(self) -> dict[str, Any]:
        """The arguments of `ImageData`."""
        names = ("augmentation", "source", "image_size", "label_smoothing")
        others = ("validation_percent", "batch_size")
        shared = {name: getattr(self, name) for name in (*names, *others)}
        return {"name": self.dataset} | shared


def _is_dtype_policy(name: Any) -> bool:
    if name == "float32":
        return True
    import keras  # Which alone knows the other names.

    try:
        return isinstance(name, str) and bool(keras.dtype_policies.get(name))
    except (TypeError, ValueError):
        return False


def recipe_of(content: Any) -> Recipe:
    """The recipe in the content of a file.

    Raises:
        TypeError, ValueError, KeyError: if there is none.
    """
    expect_object(content, seeds=(list, type(None)))
    values = VALUES_OF_OLD_FILES | content
    fields = {field.name: values[field.name] for field in dataclasses.fields(Recipe)}
    return Recipe(**fields | {"seeds": tuple(values["seeds"] or (0,))})


def with_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A copy of the recipe with some values replaced, as by `with_values`.

    Args:
        recipe: The recipe.
        settings: Strings `key=value`, such as `"eps=0.5"` or `"seeds=0,1"`.

    Raises:
        TypeError, ValueError: if a key is unknown or a value is not allowed.

    Example:
        >>> from keras_nrs.experiments.recipes import Recipe, with_settings
        >>> with_settings(Recipe(), ["seeds=3", "eps=0.5"]).seeds
        (3,)
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, text = split_setting(setting)
        value = literal(text)
        if name == "seeds" and isinstance(value, int | list):
            value = (value,) if isinstance(value, int) else tuple(value)
        changes[name] = value
    return with_values(recipe, changes)


def with_values(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of the recipe with some values replaced.

    A new source brings its `clip_norm` and `perturbation`, unless they are given.

    Raises:
        TypeError, ValueError: if a value is not allowed.
    """
    of_source = SOURCES.get(str(changes.get("source")), {})
    return dataclasses.replace(recipe, **of_source | changes)


def changes(recipe_name: str, recipe: Recipe) -> dict[str, Any]:
    """The values that make a recipe of the original with the name."""
    original = recipes()[recipe_name]
    given = {} if recipe.source == original.source else {"source": recipe.source}
    expected = dataclasses.asdict(with_values(original, given))
    values = dataclasses.asdict(recipe)
    return given | {key: values[key] for key in values if values[key] != expected[key]}


def split_setting(setting: str) -> tuple[str, str]:
    """Key and value of a string `key=value`.

    Raises:
        ValueError: if the string has another form, or no recipe has the key.
    """
    names = [field.name for field in dataclasses.fields(Recipe)]
    name, separator, text = setting.partition("=")
    if not separator or name not in names:
        similar = difflib.get_close_matches(name, names)
        keys = f"Similar keys: {', '.join(similar)}"
        if not similar:
            keys = f"The keys: {', '.join(names)}"
        raise ValueError(
            "A setting must be key=value with a key of the recipe. Received: "
            f"{setting!r}. {keys}."
        )
    return name, text


def literal(text: str) -> Any:
    """The value of a text that is a Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text


def recipes() -> dict[str, Recipe]:
    """The recipes by name: `DATASET-NETWORK-AUGMENTATION-SCHEME`, as in the tables."""
    named: dict[str, Recipe] = {}
    keys = ("dataset", "network", "augmentation", "scheme")

    def add(base: Recipe, *cell: str, **changes: Any) -> None:
        values = dict(zip(keys, cell, strict=True)) | changes
        named["-".join(cell)] = dataclasses.replace(base, **values)

    cifar = ("cifar10", "cifar100")
    # Table 1. Learning rates and decays are one point of the paper's grid.
    networks = ("vgg16", "resnet18", "wide_resnet_28_10", "pyramidnet_164_270")
    for cell in product(cifar, networks, ("basic", "cutout"), PAPER_SCHEMES):
        dataset, network, _, _ = cell
        # Table 3 gives eigenvalues of one network, Figure 2 its eps.
        flatness = network == "wide_resnet_28_10"
        eps = 0.2 if dataset == "cifar100" else 0.1
        add(Recipe(), *cell, flatness=flatness, eps=eps)
    vit = Recipe(optimizer="adam", batch_size=256)
    strategies: dict[str, dict[str, Any]] = {
        "basic": {"learning_rate": 1e-3, "weight_decay": 0.3, "epochs": 300},
        "heavy": {"learning_rate": 2e-4, "weight_decay": 0.03, "epochs": 1200},
    }
    for cell in product(cifar, ("vit_ti", "vit_s", "vit_b"), strategies, PAPER_SCHEMES):
        _, _, augmentation, _ = cell
        add(vit, *cell, **strategies[augmentation])
    # Table 2.
    imagenet = Recipe(
        image_size=224,
        label_smoothing=0.1,
        batch_size=512,
        epochs=100,
        learning_rate=0.2,
        weight_decay=1e-4,
    )
    applications = ("imagenet_vgg16", "imagenet_resnet50", "imagenet_resnet101")
    for network, scheme in product(applications, ("baseline", "nrs")):
        add(imagenet, "imagenet2012", network, "flip", scheme)
    # Beyond the tables: data at hand, with an eps that has an effect.
    digits = Recipe(
        source="paper",
        batch_size=50,
        epochs=20,
        clip_norm=5.0,
        perturbation="relative",
        eps=0.4,
        flatness=True,
    )
    for scheme in PAPER_SCHEMES:
        add(digits, "digits", "wide_resnet_10_1", "none", scheme)
    fashion = Recipe(
        source="paper",
        epochs=30,
        clip_norm=1.0,
        perturbation="filterwise",
        eps=0.3,
        normalize=True,
        flatness=True,
    )
    adam = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.1}
    for network in ("wide_resnet_10_1", "resnet18", "vit_ti"):
        changes = adam if network == "vit_ti" else {}
        for augmentation, scheme in product(("none", "basic"), PAPER_SCHEMES):
            cell = "fashion_mnist", network, augmentation, scheme
            add(fashion, *cell, **changes)
    return named
