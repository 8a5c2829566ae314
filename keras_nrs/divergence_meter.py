"""The model divergence of a batch, in inference mode."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs import keras_internals
from keras_nrs import perturbations
from keras_nrs import stateless
from keras_nrs._checks import check_seed
from keras_nrs.backend import RandomStream
from keras_nrs.backend import compile_function
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batch
from keras_nrs.nrs_model import NRSModel
from keras_nrs.step.options import DEFAULT_PERTURBATION
from keras_nrs.step.output_divergences import ChosenDivergences
from keras_nrs.step.output_divergences import as_means
from keras_nrs.step.output_divergences import check_divergence
from keras_nrs.step.output_divergences import total_divergence


def keys_of_samples(seed: int, num_samples: int) -> list[Any]:
    """A key for each perturbation, none of them another seed's too."""
    words = np.random.SeedSequence(check_seed("seed", seed)).generate_state(num_samples)
    return [keras.random.SeedGenerator(int(word) >> 1).next() for word in words]


def divergence_meter(
    model: Any,
    *,
    perturbation: str | perturbations.Perturbation | None,
    divergence: Any,
) -> "DivergenceMeter":
    """A meter for a model: equal arguments give the same one.

    Args:
        model: A built model, wrapped or not.
        perturbation: As in `keras_nrs.wrap`. Defaults to the perturbation of a wrapped
            model, and to `"relative"` for others.
        divergence: As in `keras_nrs.wrap`. Defaults to the divergence of a wrapped
            model, and to `"auto"` for others.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    chosen = ChosenDivergences("auto" if divergence is None else divergence)
    if isinstance(model, NRSModel):
        if perturbation is None:
            perturbation = model.perturbation
        if divergence is None:
            chosen = model.divergence_in_use()
        model = model.base_model
    if perturbation is None:
        perturbation = DEFAULT_PERTURBATION
    given = check_divergence(chosen.given)

    def make() -> DivergenceMeter:
        return DivergenceMeter(
            model, perturbations.get_perturbation(perturbation), chosen
        )

    if isinstance(given, list | tuple | dict):
        return make()
    key = DivergenceMeter, perturbation, given
    meter: DivergenceMeter = stateless.cached_on_model(model, key, make)
    return meter


class DivergenceMeter:
    """d(theta, theta + delta) of a model, in inference mode.

    Args:
        model: A built model, which must not be wrapped.
        perturbation: How delta is drawn.
        divergences: The divergence of each output.
    """

    def __init__(
        self,
        model: Any,
        perturbation: perturbations.Perturbation,
        divergences: ChosenDivergences,
    ) -> None:
        self.model = model
        self.perturbation = perturbation
        self._divergences = divergences
        self._compiled = compile_function(self._batch_divergence)

    def outputs(self, batch: Batch) -> Any:
        """f(x; theta)."""
        stateless.check_draws(self.model, batch.x, training=False)
        outputs = self._call(*stateless.current_values(self.model), batch)
        self._divergences.of(self.model, outputs, batch.y)
        # Masks come with the perturbed outputs.
        return keras.tree.map_structure(ops.stop_gradient, outputs)

    def divergence(self, batch: Batch, clean: Any, eps: float, key: Any) -> float:
        """The divergence of a batch under the delta that belongs to a key.

        `clean` is f(x; theta), which `outputs()` gives.
        """
        weights, state = stateless.current_values(self.model)
        eps = ops.convert_to_tensor(eps, "float32")
        value = self._compiled(weights, state, batch, clean, eps, key)
        return stateless.as_float(value)

    def _batch_divergence(
        self,
        weights: list[Any],
        state: list[Any],
        batch: Batch,
        clean: Any,
        eps: Any,
        key: Any,
    ) -> Any:
        model = self.model
        deltas = perturbations.sample_deltas(
            self.perturbation, model, weights, eps, RandomStream(key)
        )
        moved = perturbations.add_deltas(weights, deltas)
        perturbed = self._call(moved, state, batch)
        with keras_internals.losses_of_one_replica():
            return total_divergence(
                as_means(self._divergences.resolved or []),
                batch.y,
                clean,
                perturbed,
                batch.sample_weight,
            )

    def _call(self, weights: list[Any], state: list[Any], batch: Batch) -> Any:
        """The outputs, which draw the same whatever the weights are, if at all."""
        kwargs = stateless.call_kwargs(self.model, training=False)
        with restored_random_state(ops.zeros(())):
            outputs, _ = self.model.stateless_call(weights, state, batch.x, **kwargs)
        return outputs
