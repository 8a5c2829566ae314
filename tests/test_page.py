"""HTML pages in one file."""

import re

import pytest

from keras_nrs import _page

# Nothing here depends on the backend.
pytestmark = pytest.mark.only_torch


def test_a_page_needs_no_other_file() -> None:
    parts = [
        _page.heading("a <b>"),
        _page.note("c & d"),
        _page.bullets(["e < f"]),
        _page.table([["x", "y"], ["<script>", "1"]], is_text=True),
        _page.picture(b"\x89PNG", 'a "picture"'),
    ]
    text = _page.page("<title>", parts)
    assert text.startswith("<!doctype html>")
    for escaped in (
        "a &lt;b&gt;",
        "c &amp; d",
        "<li>e &lt; f</li>",
        "&lt;script&gt;",
        "a &quot;picture",
    ):
        assert escaped in text
    assert "<title>&lt;title&gt;</title>" in text
    assert '<img src="data:image/png;base64,iVBORw==" alt="a &quot;' in text
    links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(|@import""", text)
    assert all(link.startswith("data:") for link in links)
