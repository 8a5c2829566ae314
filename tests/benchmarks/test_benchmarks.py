"""The benchmarks run, on networks of no size. What they measure is not asserted."""

import functools
import json
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from tests.benchmarks import __main__ as main
from tests.benchmarks import first_step
from tests.benchmarks import growth
from tests.benchmarks import memory
from tests.benchmarks import networks
from tests.benchmarks import one_gpu
from tests.benchmarks import peers


def tiny() -> keras.Model:
    return keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(10)]
    )


@pytest.mark.filterwarnings("ignore:eps=0.3 has no effect")
@pytest.mark.matrix  # A dozen compiled steps.
def test_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "CNN", networks.Network(tiny, 4, 2))
    main.print_times("CNN")
    output = capsys.readouterr().out
    for name in (*networks.VARIANTS, "textbook SAM"):
        assert f"| {name} |" in output
    assert memory.bytes_of("CNN", 64, "NRS, memory_efficient") >= 0


@pytest.mark.only_torch  # Which variants run is the same everywhere.
def test_some_variants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "CNN", networks.Network(tiny, 4, 2))
    monkeypatch.setattr("sys.argv", ["benchmarks", "CNN", "--variants", "SAM"])
    main.main()
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["", "plain Keras", "SAM", "textbook SAM"]
    monkeypatch.setattr("sys.argv", ["benchmarks", "RNN"])
    with pytest.raises(SystemExit):
        main.main()


@pytest.mark.only_torch  # Where nothing is compiled.
def test_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "CNN", networks.Network(tiny, 4, 2))
    # A new process would not know the tiny network.
    monkeypatch.setattr(first_step, "in_new_process", first_step.first_step)
    monkeypatch.setattr("sys.argv", ["first_step", "CNN"])
    first_step.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split(" | ")[1] for line in lines]
    assert names == [networks.PLAIN, "NRS"]


@pytest.mark.filterwarnings("ignore:eps=0.3 has no effect")
@pytest.mark.matrix
def test_growth(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    growth.print_ratios("tiny", growth.tiny, 4, {"": {}})
    growth.print_noise(128)
    output = capsys.readouterr().out
    assert "tiny: " in output and "128 elements, normal: " in output
    monkeypatch.setattr(growth, "RUN_SECONDS", 0)
    row = growth.measured(growth.Point("weights", "tiny", growth.tiny, batch_size=4))
    assert row["weights"] == 50
    assert row["lowest"] <= row["ratio"] <= row["highest"]
    growth.write_curves([row], tmp_path)
    assert (tmp_path / "growth.csv").read_text().count("\n") == 2
    assert (tmp_path / "growth.png").exists()


@pytest.mark.only_torch
def test_steps_on_one_gpu(tmp_path: Path) -> None:
    """A line for each method that was compiled in time, before the limit."""
    go, file = tmp_path / "go", tmp_path / "steps.jsonl"
    go.touch()
    one_gpu.main("smoke", file, go, limit=time.time() + 60)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["plain Keras", "NRS"]
    for line in lines:
        assert (line["network"], line["backend"]) == ("smoke", "torch")
        assert line["ms"] > 0
    one_gpu.main("smoke", file, go, limit=0)
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.matrix
@pytest.mark.parametrize("peer", [peers.SAM, peers.EQUATION_3])
def test_peers_train(peer: Any) -> None:
    """Their losses come down, on a problem that a linear model solves."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = np.argmax(x, axis=1)
    model = peer[keras.config.backend()](networks.compiled(tiny))
    model.optimizer.learning_rate = 0.1
    losses = model.fit(x, y, batch_size=16, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.matrix
@pytest.mark.only_jax
def test_optax_trains() -> None:
    x, y = networks.data(networks.compiled(tiny), 8)
    peers.optax_sam(networks.compiled(tiny), x, y, 4)()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("make", "num_weights"),
    [
        (networks.mlp, 4.3e6),
        (networks.cnn, 28_000 + 5_900),
        (networks.vit, 5.37e6),
        (networks.wide_resnet, 2.75e6),
        (networks.bi_lstm, 100_000),
        (networks.embedding, 32e6),
        (functools.partial(networks.mlp, 256), 76_800),
    ],
)
def test_sizes_of_the_networks(make: Any, num_weights: float) -> None:
    assert make().count_params() == pytest.approx(num_weights, rel=0.05)
