"""The tasks of the study: what chooses settings sees no test sample."""

from itertools import combinations

import numpy as np
import pytest

from studies.study_tasks import TASKS
from studies.study_tasks import Task
from studies.tests.tiny import TASK

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_are_disjoint(task: Task) -> None:
    train, validation = task.training_data(3)
    parts = [train, validation, task.test_data()]
    sizes = task.train_samples, task.validation_samples, task.test_samples
    assert [len(part.x) for part in parts] == list(sizes)
    assert [len(part.y) for part in parts] == list(sizes)
    # Two of the digits' images are equal to others.
    for first, second in combinations(parts, 2):
        shared = {x.tobytes() for x in first.x} & {x.tobytes() for x in second.x}
        assert len(shared) <= 2 * (task.data == "digits")
    assert all(set(part.y) == set(parts[2].y) for part in parts)


def test_test_samples_are_the_same_for_all_seeds_and_training_samples_are_not() -> None:
    np.testing.assert_array_equal(TASK.test_data().x, TASK.test_data().x)
    (first, _), (again, _), (other, _) = map(TASK.training_data, (0, 0, 1))
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


def test_tables_are_standardized_without_the_test_samples() -> None:
    train, validation = TASK.training_data(0)
    pool = np.concatenate([train.x, validation.x])
    # 90 of the pool's 100 rows.
    np.testing.assert_allclose(pool.mean(axis=0), 0, atol=0.2)
    assert abs(TASK.test_data().x.mean(axis=0)).max() > 0.05


def test_each_task_has_a_network_for_its_samples() -> None:
    for task in TASKS:
        x, y = task.training_data(0)[0]
        assert task.build()(x[:2]).shape == (2, len(set(y)))
