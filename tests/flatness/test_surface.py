"""Surfaces on a page."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_nrs.flatness import Landscape
from keras_nrs.flatness import surface

pytestmark = pytest.mark.only_torch

X = np.linspace(-1, 1, 5)
BOWL = Landscape(coordinates=(X, 2 * X), losses=0.01 + np.add.outer(X**2, 3 * X**2))


def data_of(text: str) -> Any:
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    return json.loads(found)


def test_heights_colours_and_ticks() -> None:
    losses = BOWL.losses.copy()
    losses[0, 0], losses[4, 4] = np.inf, np.nan
    broken = Landscape(coordinates=BOWL.coordinates, losses=losses)
    text = surface.surfaces({"a<b>": BOWL, "broken": broken}, label="loss (nats)")
    assert text.count("<canvas") == 2
    assert "a&lt;b&gt;" in text
    data = data_of(text)
    assert data["label"] == "loss (nats)"
    first, second = (np.array(s["heights"]) for s in data["surfaces"])
    assert first[2, 2] == second[2, 2] == 0
    assert second[0, 0] == second[4, 4] == 1
    # The logarithm of the loss.
    share = np.log(BOWL.losses[2, 3] / BOWL.losses[2, 2])
    high = np.quantile(np.r_[BOWL.losses.ravel(), losses[np.isfinite(losses)]], 0.98)
    assert first[2, 3] == pytest.approx(share / np.log(high / 0.01), abs=1e-3)
    np.testing.assert_allclose(data["surfaces"][0]["y"], X)
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in data["colors"])
    places = [place for place, _ in data["ticks"]]
    assert places == sorted(places)
    assert 0 <= places[0] < places[-1] <= 1


def test_nearly_all_losses_are_the_same() -> None:
    x = np.linspace(-1, 1, 21)
    for loss in np.random.default_rng(0).uniform(0.01, 10, 50):
        losses = np.full((21, 21), loss)
        losses[10, 10] = loss / 2
        text = surface.surfaces(
            {"a": Landscape(coordinates=(x, x), losses=losses)}, label="loss"
        )
        assert data_of(text)["ticks"][-1] == [1.0, f"{loss:.3g}"]


def test_names_cannot_end_the_script() -> None:
    text = surface.surfaces({"x": BOWL}, label="</script><script>alert(1)")
    assert "<script>alert" not in text
    assert data_of(text)["label"] == "</script><script>alert(1)"


# A page's objects, as far as the script needs them. It prints what is drawn.
STUBS = """
const drawn = [];
const context = new Proxy({}, {
  get: (target, name) => target[name] ?? ((...args) => drawn.push([name, ...args])),
  set: (target, name, value) => ((target[name] = value), true),
});
const canvas = {
  clientWidth: 400, clientHeight: 300, getContext: () => context,
  listeners: {}, addEventListener(name, f) { this.listeners[name] = f; },
  setPointerCapture() {},
};
const data = { textContent: process.argv[1] };
globalThis.document = { currentScript: { parentNode: {
  querySelector: () => data, querySelectorAll: () => [canvas] } } };
globalThis.window = { addEventListener() {} };
globalThis.getComputedStyle = () => ({ color: "black" });
"""
TURN = """
const first = JSON.stringify(drawn);
drawn.length = 0;
canvas.listeners.keydown({ key: "ArrowLeft", preventDefault() {} });
const second = JSON.stringify(drawn);
drawn.length = 0;
canvas.listeners.pointermove({ buttons: 0, movementX: 9, movementY: 9 });
console.log(JSON.stringify([JSON.parse(first), JSON.parse(second), drawn.length]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="it runs the script in Node")
def test_the_script_draws_and_turns() -> None:
    data = json.dumps(data_of(surface.surfaces({"a": BOWL}, label="loss")))
    script = Path(surface.__file__).with_name("surface.js").read_text("utf-8")
    result = subprocess.run(
        ["node", "-e", STUBS + script + TURN, data],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, without_button = json.loads(result.stdout)
    # A tile for each of 4 x 4 cells.
    assert sum(call == ["fill"] for call in first) == 16
    assert len(first) == len(second)
    assert first != second
    assert without_button == 0
    for _, *numbers in first:
        assert all(np.isfinite(n) for n in numbers if not isinstance(n, str))
