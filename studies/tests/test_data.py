"""The samples of the study: what chooses settings sees no test sample."""

from itertools import combinations
from itertools import islice

import numpy as np
import pytest

from studies import data
from studies.data import Samples

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def drawn(seed: int, noise: str = "") -> tuple[Samples, Samples]:
    return data.draw("smoke", noise, train=60, validation=40, seed=seed)


def test_samples_are_disjoint_and_stratified() -> None:
    train, validation = drawn(3)
    parts = [train, validation, data.pool_and_test("smoke")[1]]
    assert [len(part.x) for part in parts] == [60, 40, 200]
    for first, second in combinations(parts, 2):
        assert not {x.tobytes() for x in first.x} & {x.tobytes() for x in second.x}
    assert set(np.bincount(train.y)) <= {5, 6, 7}


def test_a_seed_draws_samples_of_its_own_and_the_same_again() -> None:
    (first, _), (again, _), (other, _) = map(drawn, (0, 0, 1))
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


@pytest.mark.parametrize(("noise", "share"), [("flipped40", 0.4), ("random60", 0.6)])
def test_wrong_labels_are_the_same_share_of_each_class(
    noise: str, share: float
) -> None:
    true = data.pool_and_test("smoke")[0].y
    given = data.given_labels("smoke", noise)
    for label in range(10):
        of_class = given[true == label]
        n = len(of_class)
        assert (of_class != label).sum() == round(share * n)
        if noise == "flipped40":
            assert set(of_class) == {label, (label + 1) % 10}
    assert (data.given_labels("smoke", "") == true).all()


def test_a_sample_has_the_same_wrong_label_for_all_seeds() -> None:
    labels: dict[bytes, int] = {}
    for seed in range(4):
        for part in drawn(seed, "flipped40"):
            for x, y in zip(*part, strict=True):
                assert labels.setdefault(x.tobytes(), y) == y


def test_batches_depend_on_the_seed_alone() -> None:
    samples = Samples(np.arange(7.0)[:, None], np.arange(7))

    def epoch() -> list[data.Array]:
        return list(islice(data.batches(samples, size=3, seed=1), 2))

    for (x, y), (again, _) in zip(epoch(), epoch(), strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(y.argmax(axis=1), x[:, 0])
    assert len(np.unique([x for x, _ in epoch()])) == 6


def test_images_are_flipped_and_shifted() -> None:
    image = np.zeros((1, 7, 7, 1), "float32")
    image[0, 3, 2] = 1
    found = data.augmented(np.repeat(image, 500, axis=0), np.random.default_rng(0))
    rows, columns = np.nonzero(found.sum(axis=(0, 3)))
    assert set(rows) == {1, 2, 3, 4, 5}
    # Without a flip columns 0 to 4, with it 2 to 6.
    assert set(columns) == set(range(7))
    assert found.sum() == 500


def test_classes_are_chosen_and_numbered_anew() -> None:
    parts = data.draw("smoke", "", train=20, validation=10, seed=0, classes=(7, 2))
    for samples, size in zip(parts, (20, 10), strict=True):
        assert len(samples.x) == size
        assert set(samples.y) == {0, 1}
    pool = data.pool_and_test("smoke")[0]
    labels = {x.tobytes(): y for x, y in zip(*pool, strict=True)}
    for x, y in zip(*parts[0], strict=True):
        assert labels[x.tobytes()] == (7, 2)[y]
