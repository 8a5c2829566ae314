"""`wrap` and `unwrap`: what users call."""

from typing import Any
from typing import Unpack

import keras

from keras_nrs.coefficients import Given
from keras_nrs.nrs_model import NRSModel
from keras_nrs.step.options import StepArguments
from keras_nrs.step.options import with_spelled_options


@with_spelled_options
def wrap(
    model: keras.Model,
    eps: Given | None = None,
    alpha: Given | None = None,
    *,
    divergence: Any = "auto",
    seed: int | None = None,
    **options: Unpack[StepArguments],
) -> NRSModel:
    """Regularize a Keras model with NRS.

    Returns an `NRSModel` that shares the weights, the optimizer and the compiled
    state of `model`. A compiled model stays compiled: call `fit()` next.

    **eps decides everything.** By default the norm of delta is at most 0.2 times that
    of the weights, on any network. Compare with the baseline on validation data, and
    with eps from 0.1 to 0.4. The paper's own setting, `eps=0.1, perturbation="ball",
    normalize=False`, perturbs so little that its only measured effect is a doubled
    loss; training then warns.

    Args:
        model: Any `keras.Model` that does not override `train_step()`.
        eps: Size of the neighborhood of theta, >= 0. Its unit depends on
            `perturbation`. A number, or a
            `keras.optimizers.schedules.LearningRateSchedule` of the training steps,
            which are counted from 0 and go on in a saved model or a backup. Assignable
            during training. Defaults to 0.2; with `scheme="sam"` to 0.05, and with
            `"asam"` to 0.5.
        alpha: Weight of the model divergence, >= 0, a number or a schedule like `eps`.
            Assignable during training. Defaults to 1. Leave it out with `"sam"` and
            `"asam"`, which have no divergence; `"rpr"` does not use it.
        beta: Weight of the perturbed loss L(theta + delta), >= 0. `"nrs"` alone uses
            it.
        scheme: `"nrs"` minimizes Equation 3; `"rpr"` (random perturbation) minimizes
            L(theta + delta) at the price of a plain step: training metrics and
            BatchNorm statistics come from its only pass, at theta + delta;
            `"baseline"` minimizes L(theta). `"sam"` and `"asam"`, sharpness-aware
            minimization and its adaptive form, minimize L(theta + delta) with delta
            along the gradient: `perturbation="ascent"` and `"adaptive_ascent"`.
        perturbation: `"ball"`, `"relative"`, `"layerwise"`, `"filterwise"`,
            `"elementwise"`, `"released"`, `"ascent"`, `"adaptive_ascent"`, or an
            instance of `keras_nrs.perturbations.Perturbation`. Defaults to
            `"relative"`, but for `"sam"` and `"asam"`, which have their own.
        divergence: `"auto"` for the divergence that belongs to the compiled loss, or a
            `keras_nrs.divergences.Divergence`, or a list or dict of them, one (or
            `None`) for each output.
        interval: The perturbed pass runs at every `interval`-th step only; the
            other steps minimize L(theta), at the cost of a plain step.
        normalize: Whether to divide Equation 3, except for weight penalties, by
            `1 + beta`. A learning rate and penalties that were tuned without NRS then
            keep their meaning. The paper has the sum.
        perturbations_per_replica: Number of groups into which the batch of each device
            is split. Each has a delta of its own, at the cost of smaller batches for
            the hardware, with independent dropout masks and its own batch moments in
            BatchNorm. With 1 each device draws one delta, as in the paper.
        sync_perturbation: Whether all devices draw the same delta.
        perturbed_fraction: Share of each batch, > 0 and <= 1, that the perturbed pass
            and the divergence take. It is chosen at random at each step: an unbiased
            estimate of their means over the batch, for less time. The share and the
            rest have dropout masks and batch moments of their own. It must be 1 with
            `scheme="rpr"`, unless `clean_pass=True`.
        memory_efficient: Whether the perturbed pass runs a second time for its
            gradient, so that only the activations of one pass are kept. The gradients
            are the same.
        clean_pass: Whether `scheme="rpr"` also runs the pass at theta, for metrics,
            BatchNorm statistics and the divergence, as the paper's tables need it.
        antithetic: `True`: the deltas of groups come in pairs delta, -delta, so that
            the noise along the mean gradient cancels, at no cost. It needs an even
            number of groups on all devices together, or on each with
            `sync_perturbation`. `"same_samples"`: all samples have both deltas, for
            one pass more; the perturbed loss and the divergence are means over both.
        seed: Seed of the perturbations, from 0 to 2**31 - 1. By default drawn from
            Python's generator, so `keras.utils.set_random_seed()` makes a run
            repeatable.

    Returns:
        An `NRSModel`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064).

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> model = keras_nrs.wrap(model)
    >>> x, y = keras.random.normal((8, 4)), keras.ops.arange(8) % 3
    >>> history = model.fit(x, y, batch_size=2, verbose=0)
    >>> list(history.history)
    ['loss', 'model_divergence', 'perturbed_loss']
    """
    return NRSModel(
        model, eps=eps, alpha=alpha, divergence=divergence, seed=seed, **options
    )


def unwrap(model: NRSModel) -> keras.Model:
    """The user's own model inside a wrapped one, with the same weights.

    Raises:
        TypeError: if `model` is not wrapped.

    Example:

    >>> import keras, keras_nrs
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> keras_nrs.unwrap(keras_nrs.wrap(model)) is model
    True
    """
    if not isinstance(model, NRSModel):
        raise TypeError(
            "`model` must be an NRSModel, as keras_nrs.wrap() returns it. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    return model.base_model
