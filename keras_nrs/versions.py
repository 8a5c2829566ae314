"""Versions and the device in use."""

import importlib
import platform
from pathlib import Path

import keras

# What each backend's packages are, the framework first.
_PACKAGES = {
    "jax": ("jax", "jaxlib"),
    "tensorflow": ("tensorflow",),
    "torch": ("torch",),
}
_GPU_BUILDS = {
    "jax": 'pip install "jax[cuda12]=={version}"',
    "tensorflow": 'pip install "tensorflow[and-cuda]=={version}"',
    "torch": "https://pytorch.org/get-started has the line for a build with CUDA",
}


def show_versions() -> None:
    """Print the versions of all packages that matter, the backend and its device.

    If the machine has an NVIDIA GPU that the backend does not use, another line says
    so. Put these lines into bug reports.

    Example:

    >>> import keras_nrs
    >>> keras_nrs.show_versions()  # doctest: +ELLIPSIS
    keras-nrs ..., keras ..., numpy ..., Python ...
    Backend ...
    """
    backend = keras.config.backend()
    device = str(keras.ops.zeros(1).device)
    shown = _shown("keras-nrs", "keras", "numpy")
    print(f"{shown}, Python {platform.python_version()}")
    print(f"Backend {_shown(*_PACKAGES[backend])}, on {device}")
    if "cpu" in device.lower() and _has_nvidia_gpu():
        advice = _GPU_BUILDS[backend].format(version=version_of(backend))
        print(f"This machine has a GPU, which {backend} does not use: {advice}")


def _shown(*packages: str) -> str:
    return ", ".join(f"{name} {version_of(name)}" for name in packages)


def version_of(package: str) -> str:
    """The version of an installed package, or of this one."""
    # Not that of its metadata: TensorFlow may be installed as tensorflow-cpu.
    return str(importlib.import_module(package.replace("-", "_")).__version__)


def _has_nvidia_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))
