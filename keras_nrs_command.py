"""The entry point of `keras-nrs`, which answers at once and keeps the backends quiet.

It is beside the package, whose import imports Keras and the backend. That takes seconds
and is put off until the arguments are checked: commands call `load_package()`.
"""

import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.machinery import PathFinder
from typing import Any

# What TensorFlow, XLA and gRPC read at their import; 3 leaves fatal errors.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
_LOGGERS = ("absl", "jax", "tensorflow")
# Information and warnings that their libraries write in C++, whatever the levels are,
# and errors of TensorFlow 2.19, which looks for a GPU twice.
_LOG = re.compile(
    rb"E0000 00:.* Unable to register cu\w+ factory|"
    rb"[IW]\d{4} \d\d:|[IW]0000 00:|\d{4}-\d\d-\d\d .*: [IW] |"
    rb"WARNING: All log messages before absl::|To enable the following instructions:"
)


@contextmanager
def without_logs() -> Iterator[None]:
    """A context for imports, in which logs of backends below errors are left out.

    All else that is written to standard error is shown at the end.
    """
    try:
        sys.stderr.flush()
        standard_error = os.dup(2)
    except (AttributeError, OSError):  # There is none: it is None if it was closed.
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)
            file.seek(0)
            for line in file:
                if not _LOG.match(line):
                    os.write(2, line)


class QuietTensorFlow(MetaPathFinder):
    """Leaves out the logs of TensorFlow's import.

    With another backend Keras imports it late, as it serializes something.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "tensorflow":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_quietly(module: Any) -> None:
                with without_logs():
                    execute(module)

            loader.exec_module = execute_quietly
        return spec


def put_off_package() -> None:
    """Let modules of `keras_nrs` that need no Keras be imported alone.

    The package is as at the beginning of its import: its `__init__` has not run. One
    that is imported already stays.
    """
    spec = importlib.util.find_spec("keras_nrs")
    assert spec is not None
    sys.modules.setdefault("keras_nrs", importlib.util.module_from_spec(spec))


def load_package() -> None:
    """Finish the import of `keras_nrs`, if it was put off, with Keras and the backend.

    From here on the package is what users import, with its classes known to Keras.
    """
    package = sys.modules["keras_nrs"]
    if hasattr(package, "__version__"):
        return
    assert package.__spec__ is not None and package.__spec__.loader is not None
    with without_logs():
        package.__spec__.loader.exec_module(package)


def main() -> None:
    """Run the command. Levels that the user set in the environment hold."""
    for name, level in _QUIET.items():
        os.environ.setdefault(name, level)
    sys.meta_path.insert(0, QuietTensorFlow())
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    put_off_package()
    from keras_nrs import cli

    cli.main()
