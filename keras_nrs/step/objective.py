"""Equation 3 of the paper, as pure functions of the outputs of both passes."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_nrs._checks import check_bool
from keras_nrs._checks import check_nonnegative
from keras_nrs._checks import check_scalar
from keras_nrs.divergences import Divergence
from keras_nrs.keras_internals import LossFunctionWrapper
from keras_nrs.labels import naming_labels
from keras_nrs.step.output_divergences import OutputDivergence
from keras_nrs.step.output_divergences import copied_weights
from keras_nrs.step.output_divergences import for_loss
from keras_nrs.step.output_divergences import ignored_class
from keras_nrs.step.output_divergences import total_divergence

Tensor = Any


class Terms(NamedTuple):
    """The terms of Equation 3: scalars.

    Attributes:
        total: The minimized sum.
        loss: L(theta).
        divergence: d(theta, theta + delta), not multiplied by alpha.
        perturbed_loss: L(theta + delta), not multiplied by beta.
    """

    total: Tensor
    loss: Tensor
    divergence: Tensor
    perturbed_loss: Tensor


def combine(  # noqa: PLR0913
    loss: Tensor,
    divergence: Tensor,
    perturbed_loss: Tensor,
    *,
    alpha: Any,
    beta: float,
    scheme: str = "nrs",
    normalize: bool = False,
    penalty: Any = 0.0,
) -> Terms:
    """The total of a scheme, from its terms.

    `penalty` is the part of `loss` that does not depend on the outputs (weight decay
    and the like). It counts once: `rpr` keeps it although it drops the rest of `loss`,
    and `normalize` does not divide it.
    """
    if scheme == "baseline":
        total = loss
    elif scheme != "nrs":
        total = perturbed_loss + penalty
    else:
        total = loss + alpha * divergence + beta * perturbed_loss
        if normalize:
            total = penalty + (total - penalty) / (1.0 + beta)
    return Terms(total, loss, divergence, perturbed_loss)


def nrs_objective(  # noqa: PLR0913
    y_true: Tensor,
    y_pred: Tensor,
    y_pred_perturbed: Tensor,
    *,
    loss: Any,
    divergence: str | Divergence = "auto",
    alpha: Any = 1.0,
    beta: float = 1.0,
    normalize: bool = True,
    sample_weight: Tensor | None = None,
) -> Terms:
    """Equation 3 for custom training loops: `L + alpha * d + beta * L_perturbed`.

    A pure function of the outputs of both passes on one batch, differentiable in
    both. Give both passes the same dropout masks and the same random state, and add
    weight penalties once: `sum(model.losses)`, on JAX the losses of the clean pass's
    `stateless_call(..., return_losses=True)`. For a model with several outputs call it
    for each and add the totals.

    Args:
        y_true: Labels, as `loss` takes them.
        y_pred: Tensor of shape `(batch_size, ...)`, the model's output f(x; theta).
        y_pred_perturbed: Tensor of the same shape, f(x; theta + delta).
        loss: A `keras.losses.Loss`, its name, or a function `loss(y_true, y_pred)`.
        divergence: A `keras_nrs.divergences.Divergence`, or `"auto"` for the one
            that belongs to `loss`.
        alpha: Scalar weight of the divergence, >= 0.
        beta: Weight of the perturbed loss, >= 0. The paper has 1.
        normalize: Whether to divide the total by `1 + beta`, as `wrap()` does. The
            paper does not.
        sample_weight: `None`, or a tensor of shape `(batch_size,)`.

    Returns:
        A named tuple of scalar tensors: `total`, which is to be minimized, and its
        terms `loss`, `divergence` and `perturbed_loss`.

    Raises:
        ValueError: if `divergence="auto"` knows none for `loss`, or if `alpha` or
            `beta` is negative, or if the outputs differ in shape.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064),
    Equation 3.

    Examples:

    On JAX:

    ```python
    perturbation = keras_nrs.perturbations.RelativeBall()

    def objective(weights, state, x, y, seed):
        deltas = perturbation.sample(jax.lax.stop_gradient(weights), 0.3, seed)
        perturbed = [w + d for w, d in zip(weights, deltas)]
        y_pred, new_state = model.stateless_call(weights, state, x, training=True)
        y_pred_perturbed, _ = model.stateless_call(perturbed, state, x, training=True)
        terms = keras_nrs.nrs_objective(y, y_pred, y_pred_perturbed, loss=loss)
        return terms.total, new_state

    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    gradient = jax.jit(jax.grad(objective, has_aux=True))
    seeds = keras.random.SeedGenerator(0)
    gradients, state = gradient(weights, state, x, y, seeds.next())
    ```

    On TensorFlow:

    ```python
    perturbation = keras_nrs.perturbations.RelativeBall()
    seeds = keras.random.SeedGenerator(0)
    weights = model.trainable_variables
    # Copied before the first pass: both must see the same dropout masks.
    state = [tf.identity(v.value) for v in model.non_trainable_variables]
    deltas = perturbation.sample(weights, 0.3, seeds.next())
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        perturbed = [w + d for w, d in zip(weights, deltas)]
        y_pred_perturbed, _ = model.stateless_call(perturbed, state, x, training=True)
        terms = keras_nrs.nrs_objective(y, y_pred, y_pred_perturbed, loss=loss)
    # Dense: Keras's optimizers would take the rows that both passes have of an
    # embedding for gradients of their own.
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(terms.total, weights)]
    ```

    On PyTorch:

    ```python
    perturbation = keras_nrs.perturbations.RelativeBall()
    seeds = keras.random.SeedGenerator(0)
    weights = [v.value for v in model.trainable_variables]
    # Copied before the first pass: both must see the same dropout masks. Dropout
    # without a seed draws from PyTorch's global generator: replay that too. (On a
    # GPU it is torch.cuda.get_rng_state() and torch.cuda.set_rng_state().)
    state = [v.value.clone() for v in model.non_trainable_variables]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        deltas = perturbation.sample(weights, 0.3, seeds.next())
    y_pred = model(x, training=True)
    with torch.random.fork_rng():
        torch.set_rng_state(random_state)
        perturbed = [w + d for w, d in zip(weights, deltas)]
        y_pred_perturbed, _ = model.stateless_call(perturbed, state, x, training=True)
    terms = keras_nrs.nrs_objective(y, y_pred, y_pred_perturbed, loss=loss)
    gradients = torch.autograd.grad(terms.total, weights)
    ```
    """
    beta = check_nonnegative("beta", beta)
    alpha = check_scalar("alpha", alpha)
    shapes = [
        tuple(getattr(t, "shape", ("no tensor",))) for t in (y_pred, y_pred_perturbed)
    ]
    if shapes[0] != shapes[1] or "no tensor" in shapes[0]:
        raise ValueError(
            "`y_pred` and `y_pred_perturbed` must be tensors of the same shape. "
            f"Received: the shapes {shapes[0]} and {shapes[1]}. Pass one output of "
            "both passes on one batch; call this for each output if there are several."
        )
    loss = keras.losses.get(loss)
    if loss is None:
        raise ValueError(
            "`loss` must be a keras.losses.Loss, its name, or a function. Received: "
            "loss=None."
        )
    if not isinstance(loss, keras.losses.Loss):
        loss = LossFunctionWrapper(loss)
    if isinstance(divergence, str) and divergence == "auto":
        divergence = for_loss(loss, y_pred, y_true)
    elif not isinstance(divergence, Divergence):
        raise ValueError(
            "`divergence` must be 'auto' or a keras_nrs.divergences.Divergence. "
            f"Received: divergence={divergence!r}."
        )
    # A copy for each: on PyTorch, Keras multiplies masks into the weights in place.
    weight, perturbed_weight = (copied_weights(sample_weight) for _ in range(2))
    output = OutputDivergence(((),), divergence, ignore_class=ignored_class(loss))
    with naming_labels(y_true, y_pred, sample_weight):
        value = loss(y_true, y_pred, weight)
        term = total_divergence(
            [output], y_true, y_pred, y_pred_perturbed, sample_weight
        )
        return combine(
            value,
            ops.cast(term, value.dtype),
            loss(y_true, y_pred_perturbed, perturbed_weight),
            alpha=alpha if isinstance(alpha, float) else ops.cast(alpha, value.dtype),
            beta=beta,
            normalize=check_bool("normalize", normalize),
        )
