"""Training on several devices, and the same by hand."""

from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_nrs
from keras_nrs.backend import RandomStream
from keras_nrs.step.model_passes import SEED_STRIDE
from tests.support.arrays import ROUNDING
from tests.support.asserts import numpy_values
from tests.support.gradients import value_and_gradients
from tests.support.networks import cnn
from tests.support.networks import compile_classifier

BACKEND = keras.config.backend()
EPS, ALPHA, SEED = 0.3, 2.0, 5


def devices(num: int) -> AbstractContextManager[Any]:
    """A scope in which models train on that many devices, replicated."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # TensorFlow's collectives mix up several strategies of one process.
        scope: Any = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(num)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        ).scope()
    else:
        names = keras.distribution.list_devices("cpu")[:num]
        scope = keras.distribution.DataParallel(devices=names).scope()
    return scope


def network(kind: str) -> keras.Model:
    """A compiled CNN whose step of SGD subtracts the gradient from the weights."""
    model = cnn(
        batch_norm=kind == "batch_norm",
        dropout=0.5 if kind == "dropout" else 0.0,
        penalty=1e-2,
        seed=11,
        compile=False,
    )
    compile_classifier(model, optimizer=keras.optimizers.SGD(1.0))
    return model


def seeds_of_group(model: keras.Model, state: list[Any], group: int) -> list[Any]:
    """The state with which the dropout masks of a group are drawn."""
    stride = np.array([group * SEED_STRIDE, 0], "int64").astype("int32")
    weights = set(map(id, model.weights))
    return [
        s if id(v) in weights else s + ops.cast(ops.convert_to_tensor(stride), s.dtype)
        for v, s in zip(model.non_trainable_variables, state, strict=True)
    ]


def by_hand(
    model: keras.Model, x: np.ndarray, y: np.ndarray, num_groups: int
) -> dict[str, Any]:
    """The mean over groups of the batch, each with its own key, of what a step gives.

    Written with `nrs_objective` and without the training step of `keras_nrs`.
    """
    perturbation = keras_nrs.perturbations.RelativeBall()
    weights, state = (
        [ops.convert_to_tensor(value) for value in numpy_values(variables)]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    key = keras.random.SeedGenerator(SEED).next()
    groups: list[Any] = []
    size = len(x) // num_groups
    for i in range(num_groups):
        x_group = ops.convert_to_tensor(x[i * size : (i + 1) * size])
        y_group = ops.convert_to_tensor(y[i * size : (i + 1) * size])
        deltas = perturbation.sample(
            [ops.stop_gradient(w) for w in weights], EPS, RandomStream(key).fold_in(i)
        )
        own_state = seeds_of_group(model, state, i)
        found: dict[str, Any] = {}

        def objective(
            *tensors: Any,
            x: Any = x_group,
            y: Any = y_group,
            deltas: Any = deltas,
            state: Any = own_state,
            found: Any = found,
        ) -> Any:
            y_pred, new_state, losses = model.stateless_call(
                list(tensors), state, x, training=True, return_losses=True
            )
            perturbed, _ = model.stateless_call(
                [t + d for t, d in zip(tensors, deltas, strict=True)],
                state,
                x,
                training=True,
            )
            terms = keras_nrs.nrs_objective(
                y,
                y_pred,
                perturbed,
                loss=model.loss,
                alpha=ALPHA,
                normalize=False,
            )
            found["divergence"] = ops.stop_gradient(terms.divergence)
            found["state"] = [ops.stop_gradient(s) for s in new_state]
            return terms.total + sum(losses)

        if BACKEND == "jax":
            import jax

            # `found` leaves the function as an auxiliary value.
            def with_found(*tensors: Any, objective: Any = objective) -> Any:
                found: dict[str, Any] = {}
                return objective(*tensors, found=found), found

            argnums = tuple(range(len(weights)))
            (loss, found), gradients = jax.value_and_grad(
                with_found, argnums=argnums, has_aux=True
            )(*weights)
        else:
            loss, gradients = value_and_gradients(objective, weights)
        groups.append(
            {
                "loss": float(loss),
                "divergence": float(ops.convert_to_numpy(found["divergence"])),
                "gradients": [ops.convert_to_numpy(g) for g in gradients],
                "state": [ops.convert_to_numpy(s) for s in found["state"]],
            }
        )
    return {
        "loss": np.mean([g["loss"] for g in groups]),
        "divergence": np.mean([g["divergence"] for g in groups]),
        "gradients": [
            np.mean(gs, axis=0)
            for gs in zip(*(g["gradients"] for g in groups), strict=True)
        ],
        "state": [
            np.mean(s, axis=0) for s in zip(*(g["state"] for g in groups), strict=True)
        ],
    }


def on_devices(num: int, kind: str, **kwargs: Any) -> tuple[keras.Model, Any]:
    """A model on several devices, and the same wrapped."""
    with devices(num):
        model = network(kind)
        return model, wrap(model, **kwargs)


def assert_step_is(
    model: keras.Model,
    nrs: Any,
    x: np.ndarray,
    y: np.ndarray,
    num_groups: int,
    num_devices: int,
) -> None:
    """One step of fit() is the mean over the groups, calculated by hand."""
    expected = by_hand(model, x, y, num_groups)
    before = numpy_values(model.trainable_variables)
    # On TensorFlow a model's strategy is used wherever it trains.
    with devices(num_devices) if BACKEND == "jax" else nullcontext():
        history = nrs.fit(x, y, batch_size=len(x), verbose=0, shuffle=False).history
    after = numpy_values(model.trainable_variables)
    # Sums of fewer than 1,000 terms of order one.
    bound = 1000 * ROUNDING
    for a, b, gradient in zip(before, after, expected["gradients"], strict=True):
        np.testing.assert_allclose(a - b, gradient, rtol=bound, atol=bound)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=bound)
    np.testing.assert_allclose(
        history["model_divergence"], expected["divergence"], rtol=bound, atol=bound
    )
    weights = set(map(id, model.weights))
    for v, value in zip(model.non_trainable_variables, expected["state"], strict=True):
        if id(v) in weights:
            got = ops.convert_to_numpy(v)
            np.testing.assert_allclose(got, value, rtol=bound, atol=bound)


def wrap(model: keras.Model, **kwargs: Any) -> Any:
    defaults = {"eps": EPS, "alpha": ALPHA, "perturbation": "relative", "seed": SEED}
    defaults["normalize"] = False
    return keras_nrs.wrap(model, **(defaults | kwargs))


def weights_after(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_devices: int = 1,
    kind: str = "plain",
    batch_size: int = 16,
    epochs: int = 2,
    **kwargs: Any,
) -> list[np.ndarray]:
    """All variables and the history after training with the same seeds."""
    keras.utils.set_random_seed(3)
    with devices(num_devices) if num_devices > 1 else nullcontext():
        model = network(kind)
        model.optimizer.learning_rate = 0.05
        nrs = wrap(model, **kwargs)
        history = nrs.fit(
            x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
        ).history
    values = numpy_values(model.weights)
    return [*values, *(np.array(history[name]) for name in sorted(history))]


def assert_close(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    # A few steps, each of which sums fewer than 1,000 numbers of order one and passes
    # on the errors of the last one, doubled at the most.
    bound = 64 * 1000 * ROUNDING
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
