"""Small networks, and how they are compiled."""

from typing import Any

import keras
from keras import layers


@keras.saving.register_keras_serializable(package="keras_nrs_tests")
class Subclassed(keras.Model):
    """Builds itself at the first batch, and has a submodel and no training argument."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = keras.Sequential(
            [layers.Flatten(), layers.Dense(8, activation="relu")]
        )
        self.head = layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.head(self.features(inputs))


def cnn(
    *,
    dropout: float = 0.0,
    batch_norm: bool = True,
    penalty: float = 0.0,
    seed: int | None = None,
    compile: bool = True,
) -> keras.Model:
    """A small compiled CNN with logits for 3 classes.

    Dropout is seeded where `seed` is given: Keras's unseeded dropout draws from
    PyTorch's global generator.
    """
    regularizer = keras.regularizers.L2(penalty) if penalty else None
    stack: list[Any] = [keras.Input((6, 6, 1)), layers.Conv2D(4, 3)]
    if batch_norm:
        stack.append(layers.BatchNormalization(momentum=0.5))
    stack.append(layers.Activation("relu"))
    stack.append(layers.Flatten())
    if dropout:
        stack.append(layers.Dropout(dropout, seed=seed))
    stack.append(layers.Dense(8, activation="tanh", kernel_regularizer=regularizer))
    if dropout:
        stack.append(layers.Dropout(dropout, seed=None if seed is None else seed + 1))
    stack.append(layers.Dense(3))
    model = keras.Sequential(stack)
    if compile:
        compile_classifier(model)
    return model


def compile_classifier(model: keras.Model, **kwargs: Any) -> None:
    model.compile(
        **{
            "optimizer": keras.optimizers.SGD(0.05, momentum=0.9),
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        }
        | kwargs
    )
    # TensorFlow traces a step once more if variables are made in it: those of metrics
    # that are given by name, and the optimizer's.
    if model.built and keras.config.backend() == "tensorflow":
        model.optimizer.build(model.trainable_variables)
