"""What the commands say that they will do."""

from pathlib import Path

import pytest

from keras_nrs.experiments import plans
from keras_nrs.experiments.paper_sweeps import planned_trials
from keras_nrs.experiments.recipes import recipes
from keras_nrs.experiments.recipes import with_settings
from keras_nrs.experiments.space import Range
from keras_nrs.experiments.space import Space
from tests.support.fashion_mnist import use_small_set
from tests.support.fashion_mnist import write_fashion_mnist

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

CIFAR = "cifar10-resnet18-basic-nrs"


def test_where_data_are_and_whether_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "own"))
    line = plans.data_line("cifar10", None)
    assert line.startswith(
        f"Data: {tmp_path / 'own'}. cifar10 is not there yet, and is"
    )
    assert "downloaded" in line
    (tmp_path / "given/cifar10").mkdir(parents=True)
    line = plans.data_line("cifar10", str(tmp_path / "given"))
    assert line.startswith(f"Data: {tmp_path / 'given'}. cifar10 is there")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"Data: {tmp_path / 'tensorflow_datasets'}." in plans.data_line(
        "mnist", None
    )
    use_small_set(monkeypatch, tmp_path / "fashion")
    write_fashion_mnist(tmp_path / "fashion")
    line = plans.data_line("fashion_mnist", None)
    assert f"is prepared from the files in {tmp_path / 'fashion'}" in line


def test_the_folder_is_that_of_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
    folder = Path(tfds.core.constants.DATA_DIR).expanduser()
    assert plans.data_line("mnist", None).startswith(f"Data: {folder}.")


def test_a_plan_counts_runs_and_those_that_are_finished(tmp_path: Path) -> None:
    recipe = with_settings(recipes()[CIFAR], ["seeds=0,1", "epochs=7", "eps=0.3"])
    (tmp_path / CIFAR / "seed-1").mkdir(parents=True)
    (tmp_path / CIFAR / "seed-1/summary.json").touch()
    text = "\n".join(
        plans.train_plan(CIFAR, recipe, output=tmp_path, data_dir=str(tmp_path))
    )
    assert f"Recipe: {CIFAR}, with epochs=7, eps=0.3, seeds=(0, 1)" in text
    assert "2, one for each seed, of 7 epochs: 14 in all. 1 of them is finished" in text
    assert f"Results: {tmp_path / CIFAR / 'seed-N'}" in text


def test_trials_are_counted() -> None:
    recipe = recipes()[CIFAR]

    def count(space, search="grid", trials=None):  # type: ignore[no-untyped-def]
        return planned_trials(
            CIFAR, recipe, space, search=search, trials=trials, seed=0
        )

    baseline = "cifar10-resnet18-basic-baseline"
    assert count({}) == {baseline: 16, CIFAR: 9}
    assert count({"eps": [0.1, 0.2], "alpha": [1.0, 2.0]}) == {CIFAR: 4}
    assert count({"eps": [0.1, 0.2], "alpha": [1.0, 2.0]}, trials=3) == {CIFAR: 3}
    assert count({"eps": Range(0.1, 0.2)}, search="random") == {CIFAR: 20}
    assert count({"eps": Range(0.1, 0.2)}, search="hyperband") == {CIFAR: None}
    with pytest.raises(ValueError, match="A grid needs a list"):
        count({"eps": Range(0.1, 0.2)})
    lines = plans.sweep_plan(
        CIFAR, recipe, count({}), output=Path("sweeps"), data_dir="data"
    )
    assert "16 trials, 3 trainings each of up to 200 epochs: 48 trainings" in lines[1]
    assert f"Sweep of {CIFAR}: 9 trials" in lines[2]


@pytest.mark.parametrize(
    ("setting", "space", "message"),
    [
        ("eps=0.2", {"eps": [0.1]}, "'eps' is varied, and has a value as well"),
        ("alpha=2", {}, "'alpha' is varied, and has"),
        # The paper's baseline varies it.
        ("learning_rate=0.2", {}, "'learning_rate' is varied, and has"),
    ],
)
def test_no_plan_for_a_key_that_is_varied_and_has_a_value(
    setting: str, space: Space, message: str
) -> None:
    recipe = with_settings(recipes()[CIFAR], [setting])
    with pytest.raises(ValueError, match=message):
        planned_trials(CIFAR, recipe, space, search="grid", trials=None, seed=0)
