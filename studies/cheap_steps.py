"""Steps of less than two passes, which the study alone has: they run on JAX."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_nrs.divergences import CategoricalKL
from keras_nrs.perturbations import Perturbation
from keras_nrs.perturbations import get_perturbation
from keras_nrs.perturbations.deltas import add_deltas
from keras_nrs.perturbations.deltas import sample_deltas
from keras_nrs.step.objective import combine

Tensor = Any

# Their networks have no state: neither moments of BatchNorm nor seeds of dropout.
CHEAP_STEP_TASKS = ("mnist1d-cnn-1000", "fashion-mlp-3000")


class CheapStep(keras.Model):  # type: ignore[misc]
    """Trains a network with an objective of its own, and a new delta at each step.

    A subclass implements `total()`. It is compiled with a loss of labels and logits,
    and without metrics.

    Args:
        network: The network, which keeps the weights.
        perturbation: How delta is drawn.
        eps: Size of the neighborhood.
        alpha: Weight of the divergence.
    """

    def __init__(
        self,
        network: keras.Model,
        *,
        perturbation: str | Perturbation,
        eps: float,
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.perturbation = get_perturbation(perturbation)
        self.eps, self.alpha = eps, alpha
        self.divergence = CategoricalKL(from_logits=True)
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, x: Tensor) -> Tensor:
        return self.network(x)

    def total(
        self, weights: Sequence[Tensor], perturbed: Sequence[Tensor], x: Any, y: Any
    ) -> Tensor:
        """The minimized scalar of a batch.

        Args:
            weights: theta.
            perturbed: theta + delta.
            x: Inputs of shape `(batch_size, ...)`.
            y: Labels of shape `(batch_size, num_classes)`.
        """
        raise NotImplementedError

    def outputs(self, weights: Sequence[Tensor], x: Any) -> Tensor:
        """The logits of the network with these weights."""
        return self.network.stateless_call(weights, [], x, training=True)[0]

    def compute_loss_and_updates(  # noqa: PLR0913
        self,
        trainable_variables: list[Tensor],
        non_trainable_variables: list[Tensor],
        metrics_variables: list[Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        training: bool = False,
        optimizer_variables: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """What `keras.Model` takes the gradient of on JAX."""
        variables = self.trainable_variables + self.non_trainable_variables
        values = trainable_variables + non_trainable_variables
        with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
            deltas = sample_deltas(
                self.perturbation,
                self.network,
                trainable_variables,
                self.eps,
                self.seed_generator,
            )
            perturbed = add_deltas(trainable_variables, deltas)
            total = self.total(trainable_variables, perturbed, x, y)
        state = [scope.get_current_value(v) for v in self.non_trainable_variables]
        return total, (total, None, state, metrics_variables)


class SharedOut(CheapStep):
    """NRS whose samples are shared out over the passes: 1 to 2 plain trainings.

    The first samples of a batch have the pass at theta, the last as many that at
    theta + delta. Those in the middle have both, and the divergence. Batches come in
    random order, so each term is an unbiased estimate of NRS's.

    Args:
        network, perturbation, eps, alpha: As for `CheapStep`.
        in_both_passes: Share of a batch that has both passes.

    Reference: without samples in both it has the loss of Li et al. (2024),
    https://arxiv.org/abs/2404.00357, who give each pass a batch of its own.
    """

    def __init__(
        self, network: keras.Model, *, in_both_passes: float, **arguments: Any
    ) -> None:
        super().__init__(network, **arguments)
        self.in_both_passes = in_both_passes

    def total(
        self, weights: Sequence[Tensor], perturbed: Sequence[Tensor], x: Any, y: Any
    ) -> Tensor:
        end = round(len(x) * (1 + self.in_both_passes) / 2)
        start = len(x) - end
        outputs = self.outputs(weights, x[:end])
        perturbed_outputs = self.outputs(perturbed, x[start:])
        both = end - start
        divergence = 0.0
        if both:
            divergence = self.divergence(outputs[start:], perturbed_outputs[:both])
        return combine(
            self.loss(y[:end], outputs),
            divergence,
            self.loss(y[start:], perturbed_outputs),
            alpha=self.alpha,
            beta=1.0,
            normalize=True,
        ).total


class AveragedReference(CheapStep):
    """RPR whose divergence refers to averaged weights: 4/3 of a plain training.

    It minimizes L(theta + delta) + alpha * KL(f(theta_ema) || f(theta + delta)). No
    gradient flows through theta_ema, the exponential moving average of theta. It is
    corrected for its start: in the first step it is theta, then the mean of the thetas
    so far, each weighted by `momentum` to the power of its age.

    Args:
        network, perturbation, eps, alpha: As for `CheapStep`.
        reference_momentum: Momentum of the average.
    """

    def __init__(
        self, network: keras.Model, *, reference_momentum: float, **arguments: Any
    ) -> None:
        super().__init__(network, **arguments)
        self.momentum = reference_momentum
        self.steps = self.add_weight(trainable=False, initializer="zeros")
        self.averages = [
            self.add_weight(v.shape, initializer="zeros", trainable=False)
            for v in network.trainable_variables
        ]

    def total(
        self, weights: Sequence[Tensor], perturbed: Sequence[Tensor], x: Any, y: Any
    ) -> Tensor:
        self.steps.assign_add(1.0)
        rate = (1 - self.momentum) / (1 - self.momentum**self.steps)
        for average, weight in zip(self.averages, weights, strict=True):
            weight = ops.stop_gradient(weight)
            average.assign(average + rate * (weight - average))
        reference = self.outputs([v.value for v in self.averages], x)
        outputs = self.outputs(perturbed, x)
        divergence = self.divergence(reference, outputs)
        return self.loss(y, outputs) + self.alpha * divergence


def with_cheap_step(
    network: keras.Model, task: str, settings: dict[str, Any]
) -> keras.Model:
    """The network with the cheap step that the settings ask for, or itself.

    Args:
        network: The network of a task.
        task: Name of the task.
        settings: As for `training.train()`.

    Raises:
        ValueError: if the task, or the backend, has no such step.
    """
    kinds: dict[str, type[CheapStep]] = {
        "in_both_passes": SharedOut,
        "reference_momentum": AveragedReference,
    }
    for name, kind in kinds.items():
        if name not in settings:
            continue
        if task not in CHEAP_STEP_TASKS or keras.config.backend() != "jax":
            raise ValueError(
                f"`{name}` must be a setting of the tasks {list(CHEAP_STEP_TASKS)}, "
                "with the environment variable KERAS_BACKEND=jax. Received: the task "
                f"{task!r} on {keras.config.backend()}. Leave it out, or name one of "
                "these tasks: python -m studies --tasks TASK --arms ARM"
            )
        taken = (name, "perturbation", "eps", "alpha")
        return kind(network, **{k: settings[k] for k in taken if k in settings})
    return network
