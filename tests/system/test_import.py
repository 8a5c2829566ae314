"""Across modules: what importing the package loads."""

import os
import subprocess
import sys

import keras
import pytest

BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
OPTIONAL = ("keras_hub", "keras_cv", "sklearn", "matplotlib", "typer", "pandas")
OPTIONAL += ("tensorflow_datasets", "keras_nrs.data")


def loaded_modules(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_loads_no_other_backend_and_no_extra() -> None:
    bare = loaded_modules("import keras")
    added = loaded_modules("import keras, keras_nrs") - bare
    others = set(BACKENDS) - {keras.config.backend()}
    assert not added & others
    assert not added & set(OPTIONAL)


def test_unsupported_backend_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import keras_nrs"],
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
    )
    assert "Received: keras.config.backend()='numpy'" in result.stderr


@pytest.mark.parametrize("name", ["wrap", "unwrap", "NRSModel", "nrs_objective"])
def test_public_names(name: str) -> None:
    import keras_nrs

    assert getattr(keras_nrs, name).__doc__
