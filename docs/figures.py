"""The guide's figures: `KERAS_BACKEND=jax python docs/figures.py` (two minutes)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.patches import FancyBboxPatch

from keras_nrs import flatness
from keras_nrs.callbacks import WeightRecorder
from keras_nrs.experiments import demo
from keras_nrs.flatness.palette import BLUE
from keras_nrs.flatness.palette import GREEN
from keras_nrs.flatness.palette import VERMILION
from keras_nrs.flatness.palette import styles

FOLDER = Path(__file__).parent
# Points, on figures 6 inches wide: readable at the width of a phone.
FONT_SIZE = 15
SEEDS = 10
ARMS = (demo.BASELINE, demo.NRS)


def new_axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, height), dpi=200, layout="constrained")
    return figure, figure.subplots()


def trained(
    model: keras.Model, seed: int, callbacks: Sequence[keras.callbacks.Callback] = ()
) -> tuple[keras.Model, demo.Split]:
    """The base of a model of the digits' demo, trained with a seed, and the data."""
    settings = demo.Settings()
    split = demo.load_split(train_images=settings.train_images, seed=seed)
    demo.train(model, split, epochs=settings.epochs, seed=seed, callbacks=callbacks)
    return demo.base_model(model), split


def losses_around_minima() -> dict[str, np.ndarray]:
    """Training losses along a random direction, for each arm, seed and distance."""
    losses: dict[str, list[np.ndarray]] = {}
    for arm in ARMS:
        model = demo.compiled_model(arm, demo.Settings())
        for seed in range(SEEDS):
            base, split = trained(model, seed)
            landscape = flatness.loss_landscape(
                base,
                split.x_train,
                split.y_train,
                directions=1,
                num_points=41,
                seed=seed,
                batch_size=100,
            )
            losses.setdefault(arm, []).append(landscape.losses)
    return {arm: np.array(values) for arm, values in losses.items()}


def minimum(path: Path) -> None:
    """How the loss rises around the minima of the digits' demo."""
    figure, axes = new_axes(height=4)
    coordinates = np.linspace(-1, 1, 41)
    style_of = styles(ARMS)
    for arm, losses in losses_around_minima().items():
        style = style_of[arm]
        low, median, high = np.quantile(losses, [0.25, 0.5, 0.75], axis=0)
        axes.plot(coordinates, median, **style.line, linewidth=3, label=arm)
        axes.fill_between(
            coordinates, low, high, color=style.color, alpha=0.2, linewidth=0
        )
        print(arm, "median loss at 0, 0.25, 0.5:", median[[20, 25, 30]].round(4))
    axes.set_xlabel(
        "distance from the trained weights\n(1 = their own norm, by filter)"
    )
    axes.set_ylabel("training loss (nats)")
    axes.set_ylim(0, 3)
    axes.legend(frameon=False, fontsize=FONT_SIZE)
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set_fontsize(FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 2)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def landscapes(folder: Path) -> None:
    """The planes around both minima of the first seed, and the way to them."""
    models, runs, planes = {}, {}, {}
    for arm in ARMS:
        recorder = WeightRecorder(every=4)
        model = demo.compiled_model(arm, demo.Settings())
        models[arm], split = trained(model, 0, [recorder])
        runs[arm] = recorder.weights
        data = split.x_train, split.y_train
        planes[arm] = flatness.loss_landscape(
            models[arm], *data, num_points=31, batch_size=100
        )
    label = "training loss (nats)"
    flatness.draw_landscapes(planes, folder / "landscape.png", label=label)
    ends = models[demo.BASELINE], models[demo.NRS]
    curve = flatness.connect(*ends, *data, epochs=50, batch_size=25)
    for name, path in (("line", None), ("curve", curve)):
        along = flatness.interpolate(
            *ends, *data, span=(0, 1), curve=path, batch_size=100
        )
        print(name, "barrier", round(along.barrier(), 4), along.losses.round(4))
    plane = flatness.trajectory(
        models[demo.NRS], runs | {"low-loss curve": curve.points()}
    )
    print("explained", plane.explained_variance.round(3))
    for name, distances in plane.distances.items():
        print(name, "distances from the plane", distances.round(2))
    losses = flatness.loss_landscape(
        models[demo.NRS],
        *data,
        directions=plane.directions,
        span=plane.span(),
        num_points=31,
        batch_size=100,
    )
    flatness.draw_landscapes(
        {"": losses}, folder / "trajectory.png", trajectory=plane, label=label
    )


def box(axes: Any, center: tuple[float, float], text: str, color: str) -> None:
    x, y = center
    width, height = 2.3, 1.0
    corner = x - width / 2, y - height / 2
    style = "round,pad=0.05,rounding_size=0.15"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, style, facecolor="white", edgecolor=color, lw=2.5
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=FONT_SIZE, color=color)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 18, "lw": 1.8, "color": "0.35"}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def how_it_works(path: Path) -> None:
    """One training step, from top to bottom."""
    figure, axes = new_axes(height=6.2)
    left, middle, right = 1.3, 4.0, 6.7
    box(axes, (middle, 8.4), "a batch x, y", "black")
    box(axes, (left, 6.2), "model\nat θ", BLUE)
    box(axes, (right, 6.2), "the same\nat θ + δ", VERMILION)
    box(axes, (left, 3.6), "L(θ)", BLUE)
    box(axes, (middle, 3.6), "KL of the\noutputs", GREEN)
    box(axes, (right, 3.6), "L(θ + δ)", VERMILION)
    box(axes, (middle, 1.0), "sum", "black")
    for side in (left, right):
        arrow(axes, (middle + np.sign(side - middle) * 1.2, 8.1), (side, 6.8))
        arrow(axes, (side, 5.65), (side, 4.2))
        arrow(axes, (side, 5.65), (middle + np.sign(side - middle) * 0.5, 4.2))
        arrow(axes, (side, 3.05), (middle + np.sign(side - middle) * 1.25, 1.2))
    arrow(axes, (middle, 3.05), (middle, 1.6))
    axes.text(middle, 6.2, "δ: random,\nof size eps,\nnew at\neach step", **_NOTE)
    axes.text(middle + 0.15, 2.35, r"$\times\,\alpha$", **(_NOTE | {"ha": "left"}))
    axes.text(middle, 0.1, "its gradient moves θ", **_NOTE)
    axes.set(xlim=(0, 8), ylim=(-0.2, 9.1))
    axes.set_axis_off()
    figure.savefig(path)


_NOTE = {"ha": "center", "va": "center", "fontsize": FONT_SIZE - 2, "color": "0.25"}

if __name__ == "__main__":
    how_it_works(FOLDER / "how_it_works.png")
    landscapes(FOLDER)
    minimum(FOLDER / "minimum.png")
