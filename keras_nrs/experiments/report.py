"""The report of finished runs: tables and figures, as Markdown, HTML, CSV and PNG."""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from keras_nrs._files import write_text
from keras_nrs.experiments import report_figures
from keras_nrs.experiments.report_tables import Table
from keras_nrs.experiments.report_tables import tables


def write_report(runs: pd.DataFrame, folder: Path) -> list[Table]:
    """Write `report.md`, `report.html`, `runs.csv`, a CSV file for each table, figures.

    Args:
        runs: Runs, as from `read_runs()`.
        folder: Output folder. Files of an earlier report are replaced atomically.

    Returns:
        The tables.
    """
    made = tables(runs)
    figures = report_figures.draw(runs, folder)
    for table in made:
        write_text(folder / f"{table.name}.csv", table.cells.to_csv(index=False))
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    images = "".join(f"![{name}]({name})\n\n" for name in figures)
    text = "\n".join(map(to_markdown, made))
    write_text(folder / "report.md", f"{text}\n{images}".rstrip() + "\n")
    write_text(folder / "report.html", to_html(made, figures))
    return made


def to_markdown(table: Table) -> str:
    """The table as Markdown, below its title."""
    columns = list(table.cells)
    rows = [columns, ["---"] * len(columns), *table.cells.to_numpy().tolist()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"**{table.title}**", "", *lines]) + "\n"


def to_html(made: Sequence[Table], figures: Sequence[str]) -> str:
    """An HTML page of all tables and figures."""
    style = (
        "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}"
    )
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>keras_nrs report</title>"
        f"<style>{style}</style>"
    ]
    for table in made:
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(table.cells.to_html(index=False, border=0))
    parts += [f"<p><img src='{name}' style='max-width:100%'></p>" for name in figures]
    return "\n".join(parts) + "\n"
