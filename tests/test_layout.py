"""The floors of the package: imports go down, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import keras_nrs

pytestmark = pytest.mark.matrix

PACKAGE = Path(keras_nrs.__file__).parent
# Each module or folder imports from the floors below its own.
FLOORS = [
    "cli",
    "commands",
    "experiments",
    "__init__",
    "tuning",
    "callbacks wrapping",
    "flatness calibration",
    "divergence_meter batch_norm",
    "nrs_model",
    "trainers",
    "step fit_checks model_checks",
    "perturbations coefficients",
    "divergences batches stateless models data preprocessing",
    "embeddings",
    "backend",
    "forwarding labels noise saving backups unit_axes _run_store",
    "_locks _fashion_mnist _image_settings",
    "_checks _digits _files _page _schemes _signatures _student_t "
    "keras_internals versions",
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names.split()}


def module_names() -> dict[str, Path]:
    """The files of the package by the full names of their modules."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_names()


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] == "keras_nrs"}


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


def place_of(module: str) -> str:
    """The name in `FLOORS` of the file or folder that a module is in."""
    _, *parts = module.split(".")
    return parts[0] if parts else "__init__"


def test_every_module_has_a_floor() -> None:
    assert {place_of(module) for module in MODULES} == set(FLOOR_OF)


def test_imports_go_down() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, of_module in IMPORTS.items()
        for imported in of_module
        if place_of(module) != place_of(imported)
        and FLOOR_OF[place_of(module)] >= FLOOR_OF[place_of(imported)]
    ]
    assert not upward


def test_no_import_is_circular() -> None:
    TopologicalSorter(IMPORTS).prepare()
