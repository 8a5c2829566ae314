"""The line that shows runs, epochs and the time left."""

import io

import keras
import numpy as np
import pytest
from rich.console import Console

from keras_nrs.experiments.progress import RunProgress

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_the_line_says_run_epoch_and_metric() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 2), "float32")
    with RunProgress(2, 3, console, metric="loss") as progress:
        for seed in range(2):
            progress.start(f"seed {seed}")
            model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=[progress])
    text = file.getvalue()
    assert "seed 1: run 2/2, epoch 3/3, loss" in text
    assert "left" in text
    assert "…" not in text


def test_the_longest_line_of_the_demo_fits_80_columns() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    with RunProgress(40, 100, console) as progress:
        progress.start("baseline, twice the loss, seed 7")
        progress.on_epoch_end(99)
    assert "epoch 100/100" in file.getvalue()
    assert "left" in file.getvalue()
    assert "…" not in file.getvalue()


def test_a_longer_line_is_continued_on_the_next_one() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    with RunProgress(40, 100, console) as progress:
        progress.start("learning_rate=0.05,weight_decay=0.001,batch_size=256, seed 0")
        progress.on_epoch_end(99)
    assert "epoch 100/100" in file.getvalue()
    assert "left" in file.getvalue()
    assert "…" not in file.getvalue()


def test_lines_are_printed_above_it_as_they_are() -> None:
    file = io.StringIO()
    console = Console(file=file, width=40, force_terminal=True)
    text = f"[a/b]: eps=0.1 {'long ' * 20}"
    with RunProgress(1, 1, console) as progress:
        progress.print(text)
    assert f"\x1b[2K{text}\n" in file.getvalue()
