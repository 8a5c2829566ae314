"""The passes of groups joined to those of a batch, and masks that outputs carry."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_nrs.keras_internals import get_keras_mask
from keras_nrs.step.groups import split_into_groups
from keras_nrs.step.outcomes import CleanPass
from keras_nrs.step.outcomes import Passes
from keras_nrs.step.outcomes import PerturbedPass
from keras_nrs.step.outcomes import joined_passes
from keras_nrs.step.outcomes import with_masks
from tests.support.asserts import numpy_values


def scalar(number: float) -> Any:
    return ops.convert_to_tensor(number, "float32")


def clean_pass(number: float, size: int, state: list[Any]) -> CleanPass:
    outputs = ops.full((size, 2), number, "float32")
    return CleanPass(outputs, None, [scalar(number), scalar(number)], state, [])


def perturbed_pass(number: float, size: int) -> PerturbedPass:
    outputs = ops.full((size, 2), number, "float32")
    return PerturbedPass(outputs, [scalar(number), scalar(number)])


def rows(outputs: Any) -> list[float]:
    return [float(row[0]) for row in ops.convert_to_numpy(outputs)]


def test_groups_count_by_their_samples() -> None:
    # 3 samples in groups of 1 and 2.
    groups = split_into_groups(3, 2)
    counter = ops.convert_to_tensor(7, "int32")
    cleans = [
        clean_pass(1.0, 1, [scalar(1.0), counter]),
        clean_pass(4.0, 2, [scalar(4.0), counter]),
    ]
    perturbed = [perturbed_pass(10.0, 1), perturbed_pass(40.0, 2)]
    passes = joined_passes(cleans, [perturbed], groups, are_sums=[False, True])
    assert rows(passes.clean.y_pred) == rows(passes.compared) == [1, 4, 4]
    assert rows(passes.perturbed[0]) == [10, 40, 40]
    # (1 * 1 + 2 * 4) / 3, and 1 + 4.
    assert numpy_values(passes.clean.layer_losses) == pytest.approx([3.0, 5.0])
    assert numpy_values(passes.perturbed_losses[0]) == pytest.approx([30.0, 50.0])
    moment, same = passes.clean.state
    assert float(moment) == pytest.approx(3)
    assert same is counter


def test_an_empty_group_adds_nothing() -> None:
    """Of a batch of unknown size: one sample, for two groups."""
    groups = split_into_groups(ops.convert_to_tensor(1), 2)
    cleans = [clean_pass(4.0, 1, []) for _ in groups]
    perturbed = [perturbed_pass(40.0, 1) for _ in groups]
    passes = joined_passes(cleans, [perturbed], groups, are_sums=[False, True])
    assert numpy_values(passes.clean.layer_losses) == [4.0, 4.0]
    assert numpy_values(passes.perturbed_losses[0]) == [40.0, 40.0]


def test_samples_without_a_perturbed_pass_have_the_outputs_at_theta() -> None:
    """In the order of the batch, which is [2, 0, 3, 1] in the groups."""
    groups = split_into_groups(4, 1, 0.5)
    order = ops.convert_to_tensor([2, 0, 3, 1], "int32")
    passes = joined_passes(
        [clean_pass(1.0, 2, []), clean_pass(2.0, 2, [])],
        [[perturbed_pass(10.0, 2), None]],
        groups,
        order=order,
        perturbed_share=0.5,
        are_sums=[False, True],
    )
    assert rows(passes.clean.y_pred) == [1, 2, 1, 2]
    assert rows(passes.perturbed[0]) == [10, 2, 10, 2]
    # Of half the samples: their mean, and twice their sum.
    assert numpy_values(passes.perturbed_losses[0]) == [10.0, 20.0]


def test_a_group_may_have_samples_of_both_kinds() -> None:
    groups = split_into_groups(4, 1, 0.5, keep_whole=True)
    passes = joined_passes(
        [clean_pass(1.0, 4, [])],
        [[perturbed_pass(10.0, 2)]],
        groups,
        perturbed_share=0.5,
    )
    assert rows(passes.perturbed[0]) == [10, 10, 1, 1]


def test_one_group_is_the_batch() -> None:
    only, perturbed = clean_pass(1.0, 3, []), perturbed_pass(2.0, 3)
    passes = joined_passes([only], [[perturbed]], split_into_groups(3))
    assert passes.clean.y_pred is passes.compared is only.y_pred
    assert passes.perturbed == [perturbed.y_pred]
    assert joined_passes([only], None, split_into_groups(3)) == Passes(passes.clean)


def test_replicas_average_sums() -> None:
    passes = joined_passes(
        [clean_pass(1.0, 3, [])],
        [[perturbed_pass(2.0, 3)]],
        split_into_groups(3),
        num_replicas=4,
        are_sums=[False, True],
    )
    assert numpy_values(passes.clean.layer_losses) == [1.0, 4.0]
    assert numpy_values(passes.perturbed_losses[0]) == [2.0, 8.0]


def test_outputs_carry_their_masks() -> None:
    outputs = {"a": ops.ones((2, 3)), "b": ops.ones((2,))}
    masks = {"a": ops.ones((2, 3), "bool"), "b": None}
    marked = with_masks(outputs, masks)
    assert get_keras_mask(marked["a"]) is masks["a"]
    assert get_keras_mask(marked["b"]) is None
    assert keras.tree.flatten(marked)[0] is outputs["a"]
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs["b"]), [1.0, 1.0])


@pytest.mark.parametrize(("num_groups", "num_replicas"), [(2, 1), (1, 2)])
def test_scalar_outputs_have_no_shares(num_groups: int, num_replicas: int) -> None:
    groups = split_into_groups(4, num_groups)
    cleans = [CleanPass({"a": scalar(1.0)}, None, [], [], []) for _ in groups]
    with pytest.raises(ValueError, match="Outputs must have an axis of samples"):
        joined_passes(cleans, None, groups, num_replicas=num_replicas)
