"""What cheaper steps keep of NRS's effect on the demo's handwritten digits.

    KERAS_BACKEND=jax python -m tests.benchmarks.gain

Settings, seeds and measurements are the demo's; nothing is tuned for the cheaper steps.
Prints for each the test accuracy, its paired difference to the baseline with a 95 %
interval, and the largest eigenvalue of the last layer: mean and standard deviation.
"""

import keras
import numpy as np

import keras_nrs
from keras_nrs.experiments import demo
from keras_nrs.experiments.t_test import t_test
from keras_nrs.perturbations import RelativeBall

SEEDS = range(10)
VARIANTS = {
    "NRS": {},
    "rademacher noise": {"perturbation": RelativeBall(noise="rademacher")},
    "interval=2": {"interval": 2},
    "interval=4": {"interval": 4},
    "perturbed_fraction=0.5": {"perturbed_fraction": 0.5},
    "perturbed_fraction=0.25": {"perturbed_fraction": 0.25},
    "perturbations_per_replica=4": {"perturbations_per_replica": 4},
}


def measurements(model: keras.Model, settings: demo.Settings) -> np.ndarray:
    """Accuracy in percent and eigenvalue after one training for each seed."""
    rows = []
    for seed in SEEDS:
        split = demo.load_split(train_images=settings.train_images, seed=seed)
        demo.train(model, split, epochs=settings.epochs, seed=seed)
        measured = demo.measure(model, split, settings)
        rows.append([100 * measured["test_accuracy"], measured["eigenvalue"]])
    return np.array(rows)


def main() -> None:
    settings = demo.Settings()
    baseline = measurements(demo.compiled_model(demo.BASELINE, settings), settings)
    print("| | accuracy (%) | difference (points) | eigenvalue |\n|---|---|---|---|")
    for name in ("baseline", *VARIANTS):
        found = baseline
        if name in VARIANTS:
            arguments = {"perturbation": "relative"} | VARIANTS[name]
            model = keras_nrs.wrap(
                demo.compiled_model(demo.BASELINE, settings),
                settings.eps,
                settings.alpha,
                **arguments,
            )
            found = measurements(model, settings)
        (accuracy, eigenvalue), deviations = found.mean(axis=0), found.std(0, ddof=1)
        gain = t_test(found[:, 0] - baseline[:, 0])
        print(
            f"| {name} | {accuracy:.2f} ± {deviations[0]:.2f} "
            f"| {gain.mean:+.2f} ± {gain.width:.2f} "
            f"| {eigenvalue:.2f} ± {deviations[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
