"""The entry point of `keras-nrs`, which keeps the backends quiet.

It is beside the package, whose import imports the backend: TensorFlow, XLA and gRPC
read their levels of logs before.
"""

import logging
import os

# 3 leaves fatal errors.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
_LOGGERS = ("absl", "jax", "tensorflow")


def main() -> None:
    """Run the command. Levels that the user set in the environment hold."""
    for name, level in _QUIET.items():
        os.environ.setdefault(name, level)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from keras_nrs import cli

    cli.main()
