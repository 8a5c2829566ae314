"""Means over groups, and masks that outputs carry."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_nrs.keras_internals import get_keras_mask
from keras_nrs.step.groups import split_into_groups
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import PassesOutcome
from keras_nrs.step.outcomes import mean_over_groups
from keras_nrs.step.outcomes import with_masks


def outcome(number: float, size: int, state: list[Any]) -> PassesOutcome:
    scalar = ops.convert_to_tensor(number, "float32")
    y_pred = ops.full((size, 2), number, "float32")
    clean = CleanPass(scalar, 0.5 * scalar, y_pred, None, state, [], [4 * scalar])
    return PassesOutcome(clean, 2 * scalar, 3 * scalar)


def test_means_weight_groups_by_their_samples() -> None:
    # 3 samples in groups of 1 and 2.
    groups = split_into_groups(3, 2)
    counter = ops.convert_to_tensor(7, "int32")
    moments = [ops.convert_to_tensor(v, "float32") for v in (1.0, 4.0)]
    outcomes = [
        outcome(number, group.size, [moment, counter])
        for number, group, moment in zip((1.0, 4.0), groups, moments, strict=True)
    ]
    mean = mean_over_groups(outcomes, groups)
    # (1 * 1 + 2 * 4) / 3.
    np.testing.assert_allclose(ops.convert_to_numpy(mean.clean.loss), 3.0, rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(mean.clean.penalty), 1.5, rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(mean.divergence), 6.0, rtol=1e-6)
    np.testing.assert_allclose(
        ops.convert_to_numpy(mean.perturbed_loss), 9.0, rtol=1e-6
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(mean.clean.state[0]), 3.0, rtol=1e-6
    )
    (layer_loss,) = mean.clean.layer_losses
    np.testing.assert_allclose(ops.convert_to_numpy(layer_loss), 12.0, rtol=1e-6)
    assert mean.clean.state[1] is counter
    assert ops.convert_to_numpy(mean.clean.y_pred)[:, 0].tolist() == [1.0, 4.0, 4.0]


def test_one_group_is_the_batch() -> None:
    only = outcome(1.0, 3, [])
    assert mean_over_groups([only], split_into_groups(3)) is only


def test_outputs_carry_their_masks() -> None:
    outputs = {"a": ops.ones((2, 3)), "b": ops.ones((2,))}
    masks = {"a": ops.ones((2, 3), "bool"), "b": None}
    marked = with_masks(outputs, masks)
    assert get_keras_mask(marked["a"]) is masks["a"]
    assert get_keras_mask(marked["b"]) is None
    assert keras.tree.flatten(marked)[0] is outputs["a"]
