"""Images per second of the input pipeline, and what a step of ResNet18 needs.

    KERAS_BACKEND=jax python -m tests.benchmarks.input_pipeline

CIFAR-10 as TFDS mocks it: random images of 32 x 32, in memory after the first epoch.
Prints medians of 5 epochs, and their range. Nothing else may run on the machine.
"""

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_nrs import models
from keras_nrs.data import ImageData
from tests.benchmarks import networks
from tests.benchmarks import timing

NUM_IMAGES, BATCH, RUNS = 5_120, 128, 5
STEP_BATCH, STEPS = 32, 4


def images_per_second(dataset: tf.data.Dataset, steps: int) -> np.ndarray:
    """Of epochs of a data set that goes on without end, after the first."""
    batches = iter(dataset)

    def epoch() -> None:
        for _ in range(steps):
            next(batches)

    epoch()
    return steps * BATCH / np.array([timing.timed(epoch)() for _ in range(RUNS)])


def with_keras_layers() -> tf.data.Dataset:
    """The basic augmentation by Keras's layers, which draw for each image in a map."""
    crop, flip = keras.layers.RandomCrop(32, 32), keras.layers.RandomFlip("horizontal")
    dataset = tfds.load("cifar10", split="train").cache().repeat()

    def augmented(sample: dict[str, tf.Tensor]) -> tf.Tensor:
        image = tf.pad(tf.cast(sample["image"], tf.float32), [[4, 4], [4, 4], [0, 0]])
        return flip(crop(image, training=True), training=True)

    return dataset.map(augmented, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)


def main() -> None:
    def show(name: str, values: np.ndarray) -> None:
        spread = f"({min(values):,.0f}-{max(values):,.0f})"
        print(f"{name}: {np.median(values):,.0f} images/s {spread}", flush=True)

    with tfds.testing.mock_data(num_examples=NUM_IMAGES):
        for augmentation in ("none", "basic", "cutout", "heavy"):
            data = ImageData(
                name="cifar10", batch_size=BATCH, augmentation=augmentation
            )
            rate = images_per_second(data.train(), data.steps_per_epoch)
            show(f"pipeline, {augmentation}", rate)
        layers = images_per_second(with_keras_layers(), NUM_IMAGES // BATCH)
        show("pipeline, basic by Keras's layers", layers)
    x, y = networks.data(models.resnet18(), STEP_BATCH * STEPS)
    for variant in ("plain Keras", "NRS"):
        model = networks.trained(models.resnet18, variant)
        run = timing.epoch(model, x, y, STEP_BATCH)
        run()
        times = np.array([run() for _ in range(RUNS)])
        show(f"ResNet18, {variant}", STEP_BATCH * STEPS / times)


if __name__ == "__main__":
    main()
