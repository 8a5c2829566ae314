"""Across modules: the Python in the README and the guide runs as it stands there."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets

from tests.support.matrix import rest
from tests.support.processes import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Beginnings of pages that show a line or two. All other blocks run.
FRAGMENTS = {"README": 1, "index": 1, "devices": 2}


def programs(page: Path) -> list[str]:
    """Blocks of Python: one that begins with imports, and those that go on from it."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    found: list[str] = []
    for block in blocks[FRAGMENTS.get(page.stem, 0) :]:
        if block.startswith("import "):
            found.append(block)
        else:
            found[-1] += block
    return found


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


PROGRAMS = {
    f"{page.stem}-{i}": program
    for page in PAGES
    for i, program in enumerate(programs(page))
}


LOAD_DIGITS = sklearn.datasets.load_digits
# What is run on each backend: the quick start.
EXAMPLES = ["README-0"]


# Steps by the hundred show no more than some.
NUM_DIGITS = {"flatness": 100, "choosing": 220}


def some_digits(number: int, *, return_X_y: bool = False) -> Any:  # noqa: N803
    """The first samples of scikit-learn's digits."""
    digits = LOAD_DIGITS()
    names = ("data", "images", "target")
    digits.update({name: digits[name][:number] for name in names})
    return (digits.data, digits.target) if return_X_y else digits


@pytest.mark.parametrize(
    "name", [*EXAMPLES, *rest(*(name for name in PROGRAMS if name not in EXAMPLES))]
)
def test_python_of_the_guide(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    load = functools.partial(some_digits, NUM_DIGITS.get(name.split("-")[0], 300))
    monkeypatch.setattr(sklearn.datasets, "load_digits", load)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(PROGRAMS[name], names)
    assert names["model"].built


@pytest.mark.only_torch
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
