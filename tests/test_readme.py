"""The README's Python runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import keras
import pytest

import keras_nrs

README = Path(__file__).parent.parent / "README.md"


def python_block(part: str) -> str:
    """The block of Python in the README that has this part."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if part in block)
    return block


def test_quick_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(python_block("load_digits"), {})
    assert (tmp_path / "model.keras").exists()


def test_networks_and_data() -> None:
    names: dict[str, Any] = {"keras": keras, "keras_nrs": keras_nrs}
    exec(python_block("ImageData("), names)
    assert isinstance(names["model"], keras_nrs.NRSModel)
