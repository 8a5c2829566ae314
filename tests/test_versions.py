"""The lines of `show_versions()`."""

from importlib import metadata

import keras
import pytest

import keras_nrs
from keras_nrs import versions


@pytest.mark.parametrize("has_gpu", [False, True])
def test_lines(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "_has_nvidia_gpu", lambda: has_gpu)
    keras_nrs.show_versions()
    first, second, *advice = capsys.readouterr().out.splitlines()
    assert first.startswith(f"keras-nrs {keras_nrs.__version__}, keras")
    assert second.startswith(f"Backend {keras.config.backend()} ")
    device = str(keras.ops.zeros(1).device)
    assert second.endswith(f"on {device}")
    uses_cpu = "cpu" in device.lower()
    assert len(advice) == (has_gpu and uses_cpu)
    assert not advice or "does not use" in advice[0]


def test_no_package_need_have_the_name_of_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As tensorflow-cpu and keras-nightly."""

    def fail(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    keras_nrs.show_versions()
    assert f"keras {keras.__version__}" in capsys.readouterr().out
