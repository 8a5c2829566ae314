"""Settings for the whole suite, which runs once for each backend."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Each of pytest's processes prepares data sets for itself.
os.environ["TFDS_DATA_DIR"] = str(
    Path(tempfile.gettempdir())
    / f"keras_nrs-tfds-{os.environ.get('KERAS_BACKEND', '')}"
    f"-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The suite compiles hundreds of tiny programs and runs each for a moment. On the CPU
# of this machine JAX sees four devices, of which all but some tests use the first.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_force_host_platform_device_count=4"
    )
    # Programs of JAX compile in half the time. Versions that do not know it end here.
    known_to_jax = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
    if known_to_jax and not version("tensorflow").startswith("2.19."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import keras
import numpy as np
import pytest

BACKEND = keras.config.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Four devices here too.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 4,
    )


# What cannot be imported, or takes seconds, and has no doctest.
collect_ignore_glob = [
    pattern
    for other in ("jax", "tensorflow", "torch")
    if other != BACKEND
    for pattern in (f"keras_nrs/backend/{other}/*", f"keras_nrs/trainers/{other}.py")
]
collect_ignore_glob += [
    f"tests/{folder}/[!t]*.py"
    for folder in ("benchmarks", "compatibility", "keras_suite", "support")
]


def pytest_configure(config: pytest.Config) -> None:
    for backend in ("jax", "tensorflow", "torch"):
        config.addinivalue_line("markers", f"only_{backend}: runs on {backend} only")
    config.addinivalue_line("markers", "not_torch: what PyTorch does in another way")
    config.addinivalue_line("markers", "not_jax: what JAX does in another way")
    config.addinivalue_line("markers", "matrix: slow, except on PyTorch")
    config.addinivalue_line("markers", "several_devices: not in Keras on PyTorch")


@pytest.hookimpl(tryfirst=True)  # Before slow tests are left out.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out, rather than skip, what only other backends can do."""
    if BACKEND != "torch":
        for item in items:
            if item.get_closest_marker("matrix"):
                item.add_marker(pytest.mark.slow)
    others = {f"only_{b}" for b in ("jax", "tensorflow", "torch") if b != BACKEND}
    mine = f"only_{BACKEND}"
    if BACKEND == "torch":
        others |= {"several_devices", "not_torch"}
    if BACKEND == "jax":
        others |= {"not_jax"}
    items[:] = [
        item
        for item in items
        if item.get_closest_marker(mine)
        or not any(item.get_closest_marker(other) for other in others)
    ]


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all modules again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
