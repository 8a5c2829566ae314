"""The report of finished runs: tables and figures, as Markdown, HTML, CSV and PNG."""

import io
import re
import shutil
import textwrap
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from keras_nrs import _page
from keras_nrs._files import atomic_write
from keras_nrs._files import write_text
from keras_nrs._locks import locked
from keras_nrs.experiments.paired_tests import paired_differences
from keras_nrs.experiments.report_tables import Table
from keras_nrs.experiments.report_tables import tables
from keras_nrs.experiments.results import CELL
from keras_nrs.flatness.palette import styles

# A phone can show two columns of panels with letters of 12 points.
_COLUMNS, _FONT_SIZE = 2, 12
_DESCRIPTIONS = {
    "curves.png": "Accuracy on held-out samples after each epoch: mean and standard "
    "deviation over seeds. Dotted: the baseline's last.",
    "differences.png": "Differences in test accuracy to the baseline of the same seed, "
    "with 95 % intervals.",
}


def write_report(
    runs: pd.DataFrame, folder: Path, left_out: list[str] | None = None
) -> list[Table]:
    """Write `report.md`, `report.html`, `runs.csv`, a CSV file for each table, figures.

    Args:
        runs: Runs, as from `read_runs()`.
        folder: Output folder. Files of an earlier report are replaced atomically.
        left_out: What `read_runs()` left out, and why, for a section of its own. Gets
            a line for each curve that cannot be read.

    Returns:
        The tables.

    Raises:
        InUseError: if another process writes to the folder.
    """
    left_out = [] if left_out is None else left_out
    made = tables(runs)
    figures = {
        "curves.png": _curves(runs, left_out),
        "differences.png": _differences(runs),
    }
    drawn = {name: _png(figure) for name, figure in figures.items() if figure}
    with locked(folder):
        for name, content in drawn.items():
            with atomic_write(folder / name) as unfinished:
                unfinished.write_bytes(content)
        for table in made:
            write_text(folder / f"{table.name}.csv", to_csv(table.cells))
        images = "".join(f"![{name}]({name})\n\n" for name in drawn)
        text = "\n".join([*map(to_markdown, made), *_left_out_section(left_out)])
        write_text(folder / "report.md", f"{text}\n{images}".rstrip() + "\n")
        write_text(folder / "report.html", to_html(made, drawn, left_out))
        # Last: beside the page it is known as a report's.
        write_text(folder / "runs.csv", to_csv(runs))
    return made


def to_csv(cells: pd.DataFrame) -> str:
    """The table as CSV. Spreadsheets take texts that begin with `=` for formulas."""
    return cells.rename(columns=_quoted).map(_quoted).to_csv(index=False)


def _quoted(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def to_markdown(table: Table) -> str:
    """The table as Markdown, below its title."""
    columns = list(table.cells)
    rows = [columns, ["---"] * len(columns), *table.cells.to_numpy().tolist()]
    lines = ["| " + " | ".join(map(_in_markdown, row)) + " |" for row in rows]
    return "\n".join([f"**{table.title}**", "", *lines]) + "\n"


def to_text(table: Table) -> str:
    """The table for a terminal, in blocks of columns if it is too wide for one."""
    width = shutil.get_terminal_size().columns
    keys = list(table.cells)[: list(table.cells).index("training") + 1]
    cells = table.cells.map(_in_a_line).set_index(keys)
    title = textwrap.fill(table.title, width)
    return f"{title}\n\n{cells.to_string(line_width=width)}\n"


def _in_a_line(cell: Any) -> str:
    return re.sub(r"[\x00-\x1f\x7f\u2028\u2029]+", " ", str(cell))


def _in_markdown(cell: Any) -> str:
    """A text in a line and between `|`."""
    return re.sub(r"([\\|])", r"\\\1", _in_a_line(cell))


def _left_out_section(left_out: Sequence[str]) -> list[str]:
    if not left_out:
        return []
    return ["**Left out, and why**\n", *(f"- {_in_markdown(s)}" for s in left_out), ""]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def to_html(
    made: Sequence[Table], figures: Mapping[str, bytes], left_out: Sequence[str] = ()
) -> str:
    """An HTML page, in one file, of all tables and figures.

    Args:
        made: The tables.
        figures: PNG files by their names, of which `_DESCRIPTIONS` has some.
        left_out: Lines of a last section.
    """
    parts = []
    for table in made:
        rows = [list(table.cells), *table.cells.to_numpy().tolist()]
        parts.append(_page.heading(table.title))
        parts.append(_page.table([[str(c) for c in row] for row in rows], is_text=True))
    for name, content in figures.items():
        parts.append(_page.picture(content, _DESCRIPTIONS.get(name, name)))
    if left_out:
        parts += [_page.heading("Left out, and why"), _page.bullets(left_out)]
    return _page.page("keras_nrs report", parts)


def _panels(
    data: pd.DataFrame,
    height: float,
    draw_panel: Callable[[Any, pd.DataFrame], None],
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure with a panel for each cell, below the cell's name."""
    cells = list(data.groupby(CELL, sort=False))
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(
        # The text below the panels needs 6.6 inches, even below a single panel.
        figsize=(max(6.6, 3.4 * columns + 1.6), height * rows + 0.6),
        dpi=110,
        # Room between a panel's title and the numbers above it.
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12),
    )
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes, (cell, of_cell) in zip(panels.flat, cells, strict=False):
        draw_panel(axes, of_cell)
        axes.set_title(", ".join(map(str, cell)), fontsize=_FONT_SIZE + 1)
        axes.tick_params(labelsize=_FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    return figure, panels


def _curves(runs: pd.DataFrame, left_out: list[str]) -> Figure | None:
    """Accuracy after each epoch, as in Figure 2: mean and deviation over seeds.

    A dotted line marks the baseline's last accuracy.
    """
    histories = []
    for row in runs[[*CELL, "arm", "baseline", "folder"]].to_dict("records"):
        path = Path(row["folder"]) / "history.csv"
        if not path.exists():
            continue
        try:
            history = pd.read_csv(path)[["epoch", "val_accuracy"]].astype(float)
        except (OSError, KeyError, ValueError) as error:
            left_out.append(f"{path}, of the curves: {error}")
            continue
        histories.append(history.assign(**row))
    if not histories:
        return None

    together = pd.concat(histories)
    style_of = styles(map(str, together["arm"].unique()))

    def draw_panel(axes: Any, cell: pd.DataFrame) -> None:
        for arm, of_arm in cell.groupby("arm", sort=False):
            by_epoch = of_arm.groupby("epoch")["val_accuracy"]
            mean, spread = 100 * by_epoch.mean(), 100 * by_epoch.std().fillna(0)
            epochs = mean.index + 1
            style = style_of[str(arm)]
            color = style.color
            axes.plot(epochs, mean, **style.line, label=arm, linewidth=1.5)
            axes.fill_between(
                epochs, mean - spread, mean + spread, color=color, alpha=0.15
            )
            if arm in set(of_arm["baseline"]):
                axes.axhline(mean.iloc[-1], color=color, linestyle=":", linewidth=1)
        axes.set_xlabel("epoch", fontsize=_FONT_SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=_FONT_SIZE - 2, frameon=False)

    figure, panels = _panels(together, 2.8, draw_panel)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy on held-out samples (%)", fontsize=_FONT_SIZE)
    return figure


def _differences(runs: pd.DataFrame) -> Figure | None:
    """Differences in accuracy to the baseline, with 95 % intervals."""
    differences = paired_differences(runs, "test_accuracy")
    if differences.empty:
        return None
    arms = list(dict.fromkeys(differences["arm"]))
    style_of = styles(arms)

    def draw_panel(axes: Any, cell: pd.DataFrame) -> None:
        rows = [arms.index(arm) for arm in cell["arm"]]
        axes.axvline(0, color="0.6", linewidth=1)
        means, widths = 100 * cell["mean"], 100 * np.nan_to_num(cell["width"])
        for row, arm, mean, width in zip(rows, cell["arm"], means, widths, strict=True):
            color, _, marker = style_of[arm]
            axes.errorbar(
                mean,
                row,
                xerr=width,
                marker=marker,
                markersize=5,
                color=color,
                elinewidth=1.5,
            )
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)

    height = 0.26 * len(arms) + 0.7
    figure, panels = _panels(differences, height, draw_panel, sharey=True)
    panels[0, 0].set_yticks(range(len(arms)), arms)
    panels[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(
        "test accuracy - that of the baseline (points), 95 % interval",
        fontsize=_FONT_SIZE + 1,
    )
    return figure
