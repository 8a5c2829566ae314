"""What flatness measurements cost, and how they compare: tables.

KERAS_BACKEND=torch python -m tests.benchmarks.curvature pyhessian
KERAS_BACKEND=jax python -m tests.benchmarks.curvature resnet
KERAS_BACKEND=jax python -m tests.benchmarks.curvature digits
"""

import sys
import time
from typing import Any

import keras
import numpy as np

from keras_nrs import flatness
from keras_nrs.experiments import demo
from keras_nrs.experiments.t_test import t_test
from tests.benchmarks import networks
from tests.benchmarks.memory import peak_resident_bytes


def images(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the shape of CIFAR's, with as many classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, num)
    x = rng.normal(size=(num, 32, 32, 3)) + 0.1 * y[:, None, None, None]
    return x.astype("float32"), y.astype("int32")


def pyhessian() -> None:
    """The largest eigenvalue of all weights, by PyHessian and by this package."""
    import torch
    from pyhessian import hessian

    model = networks.NETWORKS["CNN"].make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    x, y = images(256)
    model.fit(x, y, verbose=0)
    data = torch.as_tensor(x), torch.as_tensor(y).long()
    for _ in range(3):
        start = time.perf_counter()
        theirs = hessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
        (value,), _ = theirs.eigenvalues(maxIter=1000, tol=1e-6)
        middle = time.perf_counter()
        ours = flatness.hessian_eigenvalues(
            model, x, y, variables="all", batch_size=256, tol=1e-4
        )
        end = time.perf_counter()
        print(
            f"PyHessian {value:.6g} in {middle - start:.2f} s, keras_nrs "
            f"{ours.eigenvalues[0]:.6g} in {end - middle:.2f} s "
            f"({ours.num_products} products)"
        )


def resnet() -> None:
    """The last layer of ResNet18 on images of CIFAR's shape: products and memory."""
    import keras_hub

    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 2],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    features = keras.layers.GlobalAveragePooling2D()(backbone.output)
    model = keras.Model(backbone.input, keras.layers.Dense(10)(features))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    for num in (250, 1000):
        x, y = images(num)
        result: Any = None

        def measure(x: Any = x, y: Any = y) -> None:
            nonlocal result
            result = flatness.hessian_eigenvalues(model, x, y, batch_size=50)

        start = time.perf_counter()
        grown = peak_resident_bytes(measure)
        seconds = time.perf_counter() - start
        print(
            f"ResNet18, {num} images: {result.eigenvalues[0]:.5g} "
            f"(residual {result.residuals[0]:.1g}) with {result.num_products} products "
            f"of two gradients each, {seconds:.0f} s, memory + {grown >> 20} MiB"
        )


def digits(seeds: int = 5) -> None:
    """The demo's baseline and NRS: eigenvalues and KFRA's share."""
    settings = demo.Settings()
    values: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[float]] = {}
    for arm in (demo.BASELINE, demo.NRS):
        model = demo.compiled_model(arm, settings)
        base = demo.base_model(model)
        for seed in range(seeds):
            split = demo.load_split(train_images=settings.train_images, seed=seed)
            demo.train(model, split, epochs=settings.epochs, seed=seed)
            data = split.x_train, split.y_train
            last, full = (
                flatness.hessian_eigenvalues(base, *data, variables=v, batch_size=100)
                for v in ("last_layer", "all")
            )
            pair = float(last.eigenvalues[0]), float(full.eigenvalues[0])
            values.setdefault(arm, []).append(pair)
            kfra = flatness.kfra_max_eigenvalue(base, data[0]).eigenvalue
            ratios.setdefault(f"CNN, {arm}", []).append(kfra / pair[0])
    for arm, pairs in values.items():
        means, deviations = np.mean(pairs, axis=0), np.std(pairs, axis=0, ddof=1)
        print(
            f"{arm}: last layer {means[0]:.3f} ± {deviations[0]:.3f}, all weights "
            f"{means[1]:.3f} ± {deviations[1]:.3f}"
        )
    logs = np.log(values[demo.NRS]) - np.log(values[demo.BASELINE])
    for name, column in zip(("last layer", "all weights"), logs.T, strict=True):
        _, mean, _, width, _ = t_test(column)
        print(
            f"NRS / baseline, {name}: {np.exp(mean):.3f} "
            f"({np.exp(mean - width):.3f} to {np.exp(mean + width):.3f}), lower "
            f"in {np.sum(column < 0)} of {seeds}"
        )
    ratios |= _kfra_of_other_networks(seeds)
    for name, of_network in ratios.items():
        low, high = min(of_network), max(of_network)
        print(f"KFRA / exact, {name}: {np.mean(of_network):.2f} ({low:.2f}-{high:.2f})")


def _kfra_of_other_networks(seeds: int) -> dict[str, list[float]]:
    """The ratio to the exact value, for a linear model and an MLP on the digits."""
    ratios: dict[str, list[float]] = {"linear": [], "MLP": []}
    for seed in range(seeds):
        split = demo.load_split(train_images=100, seed=seed)
        for name, units in (("linear", []), ("MLP", [64])):
            keras.utils.set_random_seed(seed)
            stack: list[Any] = [keras.Input((8, 8, 1)), keras.layers.Flatten()]
            stack += [keras.layers.Dense(n, activation="relu") for n in units]
            model = keras.Sequential([*stack, keras.layers.Dense(10)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adam", loss)
            model.fit(split.x_train, split.y_train, epochs=30, verbose=0)
            exact = flatness.hessian_eigenvalues(model, split.x_train, split.y_train)
            kfra = flatness.kfra_max_eigenvalue(model, split.x_train)
            ratios[name].append(kfra.eigenvalue / float(exact.eigenvalues[0]))
    return ratios


if __name__ == "__main__":
    {"pyhessian": pyhessian, "resnet": resnet, "digits": digits}[sys.argv[1]]()
