"""A study with few arms, seeds and steps."""

from keras_nrs.experiments import demo
from studies.arms import ADAPTED
from studies.arms import NRS
from studies.arms import _arm
from studies.arms import grid
from studies.study_tasks import Task

TASK = Task(
    data="wine",
    network="mlp",
    train_samples=40,
    validation_samples=50,
    test_samples=78,
)
ARMS = {
    demo.BASELINE: _arm(
        grid(learning_rate=(1e-3, 1e-2), weight_decay=(0.1,)), scheme=None
    ),
    NRS: _arm(grid(eps=(0.1, 0.3), alpha=(2.0,))),
    "ball": _arm(grid(eps=(1.0, 2.0)), perturbation="ball", alpha_of=NRS),
    ADAPTED: _arm(grid(target=(0.1,), alpha=(1.0,))),
}
