"""HTML pages in one file each: pictures are part of them, and nothing is fetched."""

import base64
import html
from collections.abc import Iterable
from collections.abc import Sequence

# Pictures have a light background, and so a light card on a dark page.
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 72em;
  padding: 0 1em; line-height: 1.4; background: Canvas; color: CanvasText; }
h1, h2 { font-weight: 600; line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid var(--line); text-align: left; }
td + td, th + th { text-align: right; }
.texts td + td, .texts th + th { text-align: left; }
img { max-width: 100%; background: white; border-radius: 6px; }
figure { margin: 1em 0; }
figcaption, .note { opacity: .8; font-size: .9em; }
.surfaces { display: flex; flex-wrap: wrap; gap: 1em; }
.surfaces figure { flex: 1 1 22em; min-width: 0; margin: 0; }
canvas { width: 100%; aspect-ratio: 4 / 3; touch-action: none; cursor: grab; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of a title, which is escaped, and of parts in HTML."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            "</body></html>\n",
        ]
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def bullets(lines: Iterable[str]) -> str:
    return "".join(["<ul>", *(f"<li>{html.escape(s)}</li>" for s in lines), "</ul>"])


def table(rows: Sequence[Sequence[str]], *, is_text: bool = False) -> str:
    """A table whose first row is its header.

    Args:
        rows: The texts of the cells.
        is_text: Whether columns after the first are aligned to the left.
    """
    header, *body = rows
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in body]
    inner = "".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="texts"' if is_text else ""
    return f'<div class="wide"><table{kind}>{inner}</table></div>'


def picture(png: bytes, description: str) -> str:
    """A picture, which is part of the page.

    Args:
        png: The content of a PNG file.
        description: What it shows, for those who cannot see it.
    """
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(description, quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{html.escape(description)}</figcaption></figure>"
    )
