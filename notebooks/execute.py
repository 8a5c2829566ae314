"""Runs the notebooks and keeps their outputs: `python notebooks/execute.py [names]`.

A name is the beginning of a file's, such as `1`. Without any, all of them run.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from keras_nrs._files import atomic_write

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.ipynb"))
# Of any machine and version.
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def read(path: Path) -> NotebookNode:
    """The notebook in a file, after a check of its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parameters_cell(notebook: NotebookNode) -> int:
    """The index of the cell of settings, as papermill marks it."""
    (index,) = [
        i
        for i, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    return index


def run(
    notebook: NotebookNode,
    *,
    folder: Path,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Run all cells in a fresh kernel; their outputs are put into the notebook.

    Args:
        notebook: Which is changed.
        folder: The kernel's working directory.
        parameters: Other settings than those of the cell that is tagged
            `parameters`. They are set by a cell after it.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises an error.
    """
    if parameters:
        source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        cell = new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1800,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        # TensorFlow's libraries greet on the process's standard error, with the time.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    )
    client.execute()


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the file as a whole or not at all, without what other runs would change."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    with atomic_write(path) as unfinished:
        nbformat.write(notebook, unfinished)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of file names")
    names = parser.parse_args().names
    chosen = [p for p in NOTEBOOKS if not names or p.name.startswith(tuple(names))]
    if not chosen:
        parser.error(f"No notebook has a name like {', '.join(names)}.")
    for path in chosen:
        print(path.name, flush=True)
        notebook = read(path)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, folder=Path(folder))
        write(notebook, path)


if __name__ == "__main__":
    main()
