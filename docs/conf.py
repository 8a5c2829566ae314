"""The guide and the API reference: `sphinx-build docs build/docs`."""

import re

import keras_nrs

project = "keras_nrs"
author = "the keras_nrs maintainers"
release = keras_nrs.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "keras_nrs"
myst_heading_anchors = 3
autodoc_typehints = "none"
default_role = "code"
# The study's report is a file beside its page.
exclude_patterns = ["study/report.md"]
myst_links_external_new_tab = False
suppress_warnings = ["myst.xref_missing"]

LINK = re.compile(r"\[([^\]]+)\]\((http[^)\s]+)\)")
# A plural after code, which Markdown allows.
PLURAL = re.compile(r"(`[^`\n]+`)(?=s\b)")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def from_markdown(*arguments: object) -> None:
    """Links and blocks of code in docstrings, which are Markdown as in Keras."""
    lines = arguments[-1]
    assert isinstance(lines, list)

    def directive(match: re.Match[str]) -> str:
        indent, language, code = match.groups()
        shifted = re.sub("^(?=.)", "    ", code, flags=re.MULTILINE)
        return f"{indent}.. code-block:: {language}\n\n{shifted}"

    text = FENCE.sub(directive, "\n".join(lines))
    text = PLURAL.sub(r"\1\\ ", text)
    lines[:] = LINK.sub(r"`\1 <\2>`__", text).split("\n")


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", from_markdown, priority=100)  # type: ignore[attr-defined]
