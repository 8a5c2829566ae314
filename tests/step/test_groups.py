"""How a batch is split: closed forms, and the same for sizes known only at run time."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_nrs.step.groups import Coverage
from keras_nrs.step.groups import Group
from keras_nrs.step.groups import perturbed_share
from keras_nrs.step.groups import split_into_groups
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.replicas import assert_close
from tests.support.replicas import assert_step_is
from tests.support.replicas import network
from tests.support.replicas import weights_after
from tests.support.replicas import wrap

SIZES = st.integers(1, 40)
DELTAS = st.integers(1, 6)
FRACTIONS = st.floats(0.01, 1.0)


def num_perturbed(group: Group) -> int:
    return int(group.num_perturbed)


@pytest.mark.matrix
@settings(deadline=None, max_examples=200)
@given(SIZES, DELTAS, FRACTIONS, st.booleans())
def test_groups_cover_the_batch(
    size: int, num_deltas: int, fraction: float, keep_whole: bool
) -> None:
    groups = split_into_groups(size, num_deltas, fraction, keep_whole=keep_whole)
    assert [g.start for g in groups] == [0, *(g.stop for g in groups[:-1])]
    assert groups[-1].stop == size
    assert all(g.size == g.stop - g.start > 0 for g in groups)
    assert {g.number for g in groups} == set(range(min(num_deltas, size)))
    assert math.fsum(g.share for g in groups) == pytest.approx(1)
    # Each sample on which the perturbed pass runs counts the same, the others not.
    total = sum(map(num_perturbed, groups))
    for group in groups:
        count = num_perturbed(group)
        assert group.is_perturbed == (count > 0)
        assert group.perturbed_share == pytest.approx(count / total)
    assert perturbed_share(groups, size) == pytest.approx(total / size)
    # As many as asked for, one for each delta at least.
    for number in range(min(num_deltas, size)):
        own = [g for g in groups if g.number == number]
        share = fraction * sum(g.size for g in own)
        assert sum(map(num_perturbed, own)) == max(1, math.floor(share + 0.5))
    if keep_whole or fraction == 1:
        assert len(groups) == min(num_deltas, size)


@settings(deadline=None, max_examples=30)
@given(SIZES, DELTAS, st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.booleans())
def test_a_size_that_is_a_tensor_gives_the_same_groups(
    size: int, num_deltas: int, fraction: float, keep_whole: bool
) -> None:
    """And groups with a share of 0, where there are fewer samples than groups."""
    known = split_into_groups(size, num_deltas, fraction, keep_whole=keep_whole)
    tensor = ops.convert_to_tensor(size, "int32")
    unknown = split_into_groups(tensor, num_deltas, fraction, keep_whole=keep_whole)
    groups = [
        Group(*(None if f is None else np.array(ops.convert_to_numpy(f)) for f in g))
        for g in unknown
    ]
    for group in groups:
        assert 0 <= group.start < group.stop <= size
        if num_deltas > 1 or fraction < 1:
            assert group.share == pytest.approx(group.size / size)
    share = ops.convert_to_numpy(perturbed_share(unknown, tensor))
    assert share == pytest.approx(perturbed_share(known, size))
    counted = [g for g in groups if g.size > 0]
    assert sum(g.perturbed_share for g in groups) == pytest.approx(1)
    assert sum(g.size for g in counted) == size
    if size < num_deltas:
        return
    for group, expected in zip(counted, known, strict=True):
        for name in ("start", "stop", "share", "perturbed_share"):
            got, want = getattr(group, name), getattr(expected, name)
            assert got == pytest.approx(want), name


def test_a_whole_batch_is_one_group() -> None:
    (group,) = split_into_groups(7)
    assert group == Group(0, 0, 7, Coverage.ALL, 7, 7, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["dropout", *rest("plain", "batch_norm")])
def test_gradient_is_the_mean_over_the_groups_of_a_replica(kind: str) -> None:
    x, y = image_data(15)
    model = network(kind)
    assert_step_is(model, wrap(model, perturbations_per_replica=3), x, y, 3, 1)


@pytest.mark.parametrize("num_groups", [6, *rest(5, 10)])
def test_groups_cover_a_batch_that_they_do_not_divide(num_groups: int) -> None:
    """Batches of 8 and of 5 samples: also with more groups than samples."""
    x, y = image_data(13)
    kwargs: dict[str, Any] = {"perturbation": FixedPerturbation(), "eps": 0.05}
    assert_close(
        weights_after(
            x, y, perturbations_per_replica=num_groups, batch_size=8, **kwargs
        ),
        weights_after(x, y, batch_size=8, **kwargs),
    )


@pytest.mark.matrix
def test_groups_leave_frozen_layers_alone() -> None:
    """Their weights are state that no step changes: it is not even assigned."""
    x, y = image_data(16)
    model = cnn()
    model.layers[0].trainable = False
    compile_classifier(model)
    nrs = wrap(model, perturbations_per_replica=2)
    frozen = model.layers[0].kernel
    before = numpy_values([frozen])
    if keras.config.backend() != "jax":
        frozen.assign = lambda value: pytest.fail("assigned")
    nrs.fit(x, y, batch_size=16, verbose=0)
    assert_equal(numpy_values([frozen]), before)


@pytest.mark.matrix
def test_groups_see_no_divergence_without_a_delta() -> None:
    """Each group compares its own dropout masks and batch moments."""
    x, y = image_data(32)
    model = cnn(dropout=0.5, seed=1)
    nrs = wrap(model, eps=0.0, perturbations_per_replica=4)
    history = nrs.fit(x, y, batch_size=16, verbose=0).history
    assert history["model_divergence"] == [0.0]
