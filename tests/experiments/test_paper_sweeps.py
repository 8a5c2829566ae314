"""The paper's own sweeps."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from keras_nrs.experiments.recipes import Recipe
from tests.experiments.runs import BASELINE
from tests.experiments.runs import NRS
from tests.experiments.runs import RPR
from tests.experiments.sweeps import invoke
from tests.experiments.sweeps import set_accuracy

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_the_papers_sweeps_share_the_baselines(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(recipe: Recipe) -> float:
        if recipe.scheme == "baseline":
            return 0.5 + recipe.learning_rate + recipe.weight_decay
        assert (recipe.learning_rate, recipe.weight_decay) == (0.2, 1e-3)
        return 0.8 - abs(recipe.eps - 0.1) - recipe.alpha / 10

    set_accuracy(monkeypatch, accuracy)
    settings = ["--set", "seeds=3", "--set", "perturbation=ball"]
    options = [*settings, "--output", str(tmp_path)]
    result = invoke(NRS, *options)
    assert result.exit_code == 0, result.output
    assert len(trained) == 16 + 9
    best = json.loads((tmp_path / NRS / "best.json").read_text())
    assert best["values"] == {"eps": 0.1, "alpha": 0.5}
    command = best["train"]
    assert command in result.output
    for setting in ("learning_rate=0.2", "weight_decay=0.001", "batch_size=128"):
        assert f"--set {setting} " in command
    assert "validation_percent" not in command
    # The command trains this recipe.
    parsed = [part for part in shlex.split(command) if "=" in part]
    assert {"seeds=(3,)", "perturbation=ball", "eps=0.1", "alpha=0.5"} < set(parsed)
    result = invoke(RPR, "--output", str(tmp_path), "--set", "seeds=3")
    assert result.exit_code == 0, result.output
    assert len(trained) == 16 + 9 + 3
    # A worker needs the baseline's finished sweep.
    distributed = {"IP": "127.0.0.1", "PORT": "1"}
    for name, value in distributed.items():
        monkeypatch.setenv(f"KERASTUNER_ORACLE_{name}", value)
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker")
    result = invoke(NRS, "--output", str(tmp_path / "new"), "--set", "seeds=3")
    assert result.exit_code == 2
    first = f"keras-nrs sweep {BASELINE} --set 'seeds=(3,)' --output {tmp_path}/new"
    # The error message breaks long lines anywhere.
    assert "".join(first.split()) in "".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10-resnet-basic-nrs", "No recipe has the name"),
        ("cifar10-vit_s-basic-baseline", "varies none. Say what to vary: --vary"),
        ("imagenet2012-imagenet_vgg16-flip-baseline", "--vary KEY=V1,V2"),
    ],
)
def test_recipes_without_a_sweep(tmp_path: Path, name: str, message: str) -> None:
    result = invoke(name, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_vits_have_no_baseline_first(tmp_path: Path, trained: list[Any]) -> None:
    result = invoke("cifar10-vit_s-basic-rpr", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert len(trained) == 3 * 3
