"""Names the extra that a command of `keras-nrs` lacks."""

import sys
from typing import Any

_DEMO = ("typer", "sklearn", "scipy", "matplotlib")
_EXPERIMENTS = ("tensorflow", "tensorflow_datasets", "pandas", "keras_tuner")
_EXTRA_OF = dict.fromkeys(_DEMO, "demo") | dict.fromkeys(_EXPERIMENTS, "experiments")


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: if typer is not installed.
    """
    from keras_nrs.commands import app

    return app


def main() -> None:
    """Run the command."""
    try:
        build_app()()
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.exit(
            f"Error: keras-nrs needs the package {error.name}. Install it with: "
            f'pip install "keras-nrs[{extra}]"'
        )
