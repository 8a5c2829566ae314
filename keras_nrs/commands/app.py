"""The application, and how it shows errors."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated
from typing import Any

import typer
from typer.core import TyperGroup

from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError

# What some packages say in errors of their own about errors of the system.
_SYSTEM_ERRORS = [
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
]


class _OneLineErrors(TyperGroup):
    """Shows errors that are not of this program as one line, and exits with 1.

    These are errors of the system, and files that are damaged or in use. The exit code
    is 2 after bad arguments, and 130 after Ctrl-C.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped. The same command goes on from here.", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except Exception as error:
            # Typer's own errors, which it shows, may have such an error as the cause.
            text = None if hasattr(error, "exit_code") else _line(error)
            if text is None:
                raise
            typer.echo(f"Error: {text}", err=True)
            raise typer.Exit(1) from error


def _line(error: BaseException) -> str | None:
    """An error in a line, `None` for one that is this program's own."""
    known = (OSError, FloatingPointError, DamagedFileError, InUseError)
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror:
        text = f"{error.strerror}: {error.filename!r}" if error.filename else text
    if isinstance(error, known) or any(name in text for name in _SYSTEM_ERRORS):
        return " ".join(text.split())
    return None if error.__cause__ is None else _line(error.__cause__)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Rich's boxes would break the lines of error messages.
    rich_markup_mode=None,
)


def _show_versions(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"keras-nrs {version('keras-nrs')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions, and exit.",
        ),
    ] = False,
) -> None:
    """Neighborhood Region Smoothing for Keras models."""


@contextmanager
def bad_parameters(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors into errors of an argument, which are shown without a traceback."""
    try:
        yield
    except DamagedFileError:
        raise
    except errors as error:
        raise typer.BadParameter(str(error)) from error
