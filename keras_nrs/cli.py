"""The entry point of `keras-nrs`, which names the extra that a command lacks."""

import sys
from typing import Any

_EXTRAS = ("typer", "sklearn", "scipy", "matplotlib")
_EXPERIMENTS = ("tensorflow", "tensorflow_datasets", "pandas", "keras_tuner")


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: if typer is not installed.
    """
    from keras_nrs.commands import app

    return app


def main() -> None:
    """Entry point of `keras-nrs`."""
    try:
        build_app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*_EXTRAS, *_EXPERIMENTS):
            raise
        extra = "experiments" if package in _EXPERIMENTS else "demo"
        sys.exit(
            f"Error: keras-nrs needs the package {error.name}. Install it with: "
            f'pip install "keras-nrs[{extra}]"'
        )
