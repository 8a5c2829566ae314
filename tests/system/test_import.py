"""Across modules: what importing the package loads."""

import keras
import pytest

from tests.support.processes import run_python

BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
OPTIONAL = ("keras_hub", "keras_cv", "sklearn", "matplotlib", "typer", "pandas")
OPTIONAL += ("tensorflow_datasets", "keras_nrs.data")


def test_loads_no_other_backend_and_no_extra() -> None:
    script = "import keras, sys; bare = set(sys.modules); import keras_nrs"
    added = set(run_python(f"{script}; print(*set(sys.modules) - bare)").split())
    others = set(BACKENDS) - {keras.config.backend()}
    assert "keras_nrs" in added
    assert not added & others
    assert not added & set(OPTIONAL)


@pytest.mark.only_torch
@pytest.mark.parametrize("name", ["experiments.demo_report", "flatness.report"])
def test_the_demo_needs_no_package_of_the_experiments(name: str) -> None:
    missing = ("pandas", "keras_tuner", "tensorflow", "tensorflow_datasets")
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing}))"
    run_python(f"{hide}; import keras_nrs.commands, keras_nrs.{name}")


@pytest.mark.only_torch
def test_unsupported_backend_is_named() -> None:
    with pytest.raises(AssertionError, match=r"keras.config.backend\(\)='numpy'"):
        run_python("import keras_nrs", backend="numpy")


@pytest.mark.parametrize("name", ["wrap", "unwrap", "NRSModel", "nrs_objective"])
def test_public_names(name: str) -> None:
    import keras_nrs

    assert getattr(keras_nrs, name).__doc__
