"""Across modules: what importing the package loads."""

import keras
import pytest

from tests.support.processes import run_python

BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
OPTIONAL = ("keras_hub", "keras_cv", "sklearn", "matplotlib", "typer", "pandas")
OPTIONAL += ("tensorflow_datasets", "keras_nrs.data")
# What few programs use, and takes time to import.
OPTIONAL += ("keras_nrs.tuning", "keras_nrs.flatness", "keras_nrs.models")


SCRIPT = """
import keras, sys
bare = set(sys.modules)
import keras_nrs
print(*set(sys.modules) - bare)
# What Keras or a backend has imported by itself stays.
extras = "typer", "sklearn", "scipy", "matplotlib"
hidden = [name for name in extras if name not in sys.modules]
sys.modules.update(dict.fromkeys(hidden))
import keras_nrs.cli, keras_nrs.experiments
for name in hidden:
    del sys.modules[name]
# The demo needs no package of the experiments.
experiments = "pandas", "keras_tuner", "tensorflow", "tensorflow_datasets"
sys.modules.update(dict.fromkeys(experiments))
import keras_nrs.commands, keras_nrs.experiments.demo_report, keras_nrs.flatness.report
"""


def test_loads_no_other_backend_and_no_extra() -> None:
    if keras.config.backend() == "torch":
        script = SCRIPT
    else:
        script = SCRIPT.partition("# What Keras")[0]
    added = set(run_python(script).split())
    others = set(BACKENDS) - {keras.config.backend()}
    assert "keras_nrs" in added
    assert not added & others
    assert not added & set(OPTIONAL)


@pytest.mark.only_torch
def test_unsupported_backend_is_named() -> None:
    with pytest.raises(AssertionError, match=r"keras.config.backend\(\)='numpy'"):
        run_python("import keras_nrs", backend="numpy")


@pytest.mark.parametrize("name", ["wrap", "unwrap", "NRSModel", "nrs_objective"])
def test_public_names(name: str) -> None:
    import keras_nrs

    assert getattr(keras_nrs, name).__doc__
