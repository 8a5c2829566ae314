"""Across modules: models and losses of other kinds train as in plain Keras."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from tests.support.asserts import assert_equal
from tests.support.keras_trainer import WEIGHT
from tests.support.keras_trainer import X
from tests.support.keras_trainer import Y
from tests.support.keras_trainer import both
from tests.support.keras_trainer import classifier
from tests.support.keras_trainer import fit
from tests.support.networks import compile_classifier


def nested(**kwargs: Any) -> keras.Model:
    """Inputs in a dict with a list, and two outputs by name."""
    inputs = {
        "left": keras.Input((4,), name="left"),
        "right": [keras.Input((2,), name="right_0"), keras.Input((2,), name="right_1")],
    }
    hidden = layers.Concatenate()(
        [layers.Dense(3)(i) for i in keras.tree.flatten(inputs)]
    )
    outputs = {
        "kind": layers.Dense(3, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = keras.Model(inputs, outputs)
    losses = {
        "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "size": "mse",
    }
    model.compile(**{"optimizer": "rmsprop", "loss": losses} | kwargs)
    return model


NESTED_X = {"left": X, "right": [X[:, :2], X[:, 2:]]}
NESTED_Y = {"kind": Y, "size": X[:, :1] ** 2}


def test_nested_inputs_and_outputs_with_losses_by_name() -> None:
    weights = {"kind": 0.5, "size": 2.0}

    def train(model: keras.Model) -> Any:
        history = fit(model, x=NESTED_X, y=NESTED_Y, validation_split=1 / 3)
        if "perturbed_loss" not in history:
            for prefix in ("", "val_"):
                kind, size = (history[f"{prefix}{n}_loss"] for n in weights)
                total = 0.5 * np.array(kind) + 2.0 * np.array(size)
                np.testing.assert_allclose(history[f"{prefix}loss"], total, rtol=1e-5)
        assert "kind_accuracy" in history and "size_mae" in history
        weighted = {"kind": WEIGHT[:8], "size": WEIGHT[8:16]}
        batch = keras.tree.map_structure(lambda t: t[:8], (NESTED_X, NESTED_Y))
        logs = model.train_on_batch(*batch, sample_weight=weighted, return_dict=True)
        prediction = model.predict(NESTED_X, batch_size=8, verbose=0)
        return [history, logs, prediction]

    make = functools.partial(
        nested, loss_weights=weights, metrics={"kind": ["accuracy"], "size": ["mae"]}
    )
    both(make, train)


# As Keras says of it.
@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_an_output_without_a_loss() -> None:
    make = functools.partial(nested, loss={"kind": None, "size": "mse"})
    both(make, lambda m: fit(m, x=NESTED_X, y={"size": NESTED_Y["size"]}, epochs=1))


def test_freezing_and_compiling_again() -> None:
    """What is trainable is looked up when compiled, and frozen weights stay."""

    def train(model: keras.Model) -> Any:
        base = getattr(model, "base_model", model)
        histories = [fit(model, epochs=1)]
        base.layers[0].trainable = False
        frozen = base.layers[0].get_weights()
        compile_classifier(model, optimizer="rmsprop", metrics=[])
        histories.append(fit(model, epochs=1))
        assert_equal(base.layers[0].get_weights(), frozen)
        assert len(model.trainable_variables) == len(base.trainable_variables) == 4
        base.layers[0].trainable = True
        compile_classifier(model, metrics=["accuracy"])
        histories.append(fit(model, epochs=1))
        assert not np.array_equal(base.layers[0].get_weights()[0], frozen[0])
        return histories

    both(classifier, train)


@pytest.mark.matrix
@pytest.mark.not_torch  # Keras has no steps_per_execution there.
def test_steps_per_execution_and_its_hooks() -> None:
    """Three batches in executions of two: hooks are called for executions."""

    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        compile_classifier(model, steps_per_execution=2)
        return model

    def train(model: keras.Model) -> Any:
        ends: list[Any] = []
        callback = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(batch)
        )
        result = fit(model, callbacks=[callback], validation_split=0.5)
        return [result, ends, model.predict(X, batch_size=8, verbose=0)]

    both(make, train)


@pytest.mark.matrix
def test_constraints_hold_after_each_step() -> None:
    def make() -> keras.Model:
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, kernel_constraint="unit_norm")]
        )
        compile_classifier(model)
        return model

    def train(model: keras.Model) -> Any:
        history = fit(model)
        norms = np.linalg.norm(model.get_weights()[0], axis=0)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)
        return history

    both(make, train)


@pytest.mark.matrix
def test_swap_ema_weights() -> None:
    """The averages are in use after each epoch, as in plain Keras."""

    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        compile_classifier(model, optimizer=optimizer)
        return model

    def train(model: keras.Model) -> Any:
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return fit(model, callbacks=[swap], validation_split=1 / 3)

    both(make, train)
