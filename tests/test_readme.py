"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_quick_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (quick_start,) = (block for block in blocks if "load_digits" in block)
    names: dict[str, object] = {}
    exec(quick_start, names)
    assert (tmp_path / "model.keras").exists()
