"""Keras's private names: all are in `keras_internals`, and none of them is gone."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from keras_nrs import keras_internals

BACKEND = keras.config.backend()
OTHER_BACKENDS = {"jax", "tensorflow", "torch"} - {BACKEND}
PACKAGE = Path(keras_nrs.__file__).parent
# Names of named tuples and the standard library, and of KerasTuner's search by grid.
NOT_OF_KERAS = {"_asdict", "_getframe", "_replace", "_ordered_ids", "_random_state"}
# What `NRSModel` must override: Keras's trainers use these on the model that is fitted.
OVERRIDES = {
    "_compile_loss": "the base model has the compiled loss",
    "_compile_metrics": "the base model has the compiled metrics",
    "_loss_tracker": "the base model has the metric of the loss",
    "_distribute_strategy": "the base model was made under the strategy",
    "_flatten_metrics_in_order": "lists have what plain Keras returns",
    "_get_metrics_result_or_logs": "on PyTorch logs are those of all processes",
    "_maybe_symbolic_build": "Keras's own cannot reduce a batch over several workers",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The underscored attributes in a syntax tree, and the nodes that have them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "delattr",
            "getattr",
            "hasattr",
            "setattr",
        ):
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and is_private(name):
                yield node, name


INTERNALS = ast.parse(inspect.getsource(keras_internals))
NAMES = sorted(
    {
        (function.name, name)
        for function in INTERNALS.body
        if isinstance(function, ast.FunctionDef | ast.ClassDef)
        for _, name in private_names(function)
    }
)
NAMES_HERE = [
    (function, name)
    for function, name in NAMES
    if not any(other in function for other in OTHER_BACKENDS)
]


@pytest.fixture(scope="module")
def objects_of_keras() -> list[Any]:
    """An object of each kind whose private names are used."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    embedding = keras.layers.Embedding(2, 2)
    embedding.build()
    return [
        model,
        model.outputs[0],
        model.layers[-1],
        embedding,
        keras_internals.compiled_loss(model),
        keras.losses.MeanSquaredError(),
        keras.metrics.MeanSquaredError(),
        keras.callbacks.BackupAndRestore("unused"),
        keras.callbacks.TensorBoard("unused"),
        keras.ops.softmax(keras.ops.ones((1, 2))),
        importlib.import_module(f"keras.src.backend.{BACKEND}.trainer"),
    ]


@pytest.mark.parametrize(
    ("function", "name"), NAMES_HERE, ids=[".".join(names) for names in NAMES_HERE]
)
def test_keras_has_the_private_name(
    function: str, name: str, objects_of_keras: list[Any]
) -> None:
    assert any(hasattr(object, name) for object in objects_of_keras), (
        f"Keras {keras.__version__} has no {name}, which {function}() needs"
    )


TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "keras_internals.py"
}


def test_names_are_found() -> None:
    """Or the next test would find nothing either."""
    assert len(NAMES) > 15
    assert ("flat_losses", "_user_loss_weights") in NAMES
    assert ("OverridableBackup", "_current_epoch") in NAMES
    assert len(TREES) > 50


def names_defined_in(tree: ast.AST) -> Iterator[str]:
    """Names of functions, of attributes of classes, and of assigned attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    yield from (ast.unparse(target) for target in statement.targets)
                elif isinstance(statement, ast.AnnAssign):
                    yield ast.unparse(statement.target)


OWN_NAMES = NOT_OF_KERAS.union(*map(names_defined_in, TREES.values()))
OWN_NAMES -= {name for _, name in NAMES} | set(OVERRIDES)


@pytest.mark.matrix
@pytest.mark.parametrize("path", TREES)
def test_other_modules_use_no_private_name_of_keras(path: str) -> None:
    tree = TREES[path]
    found = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)
        and "keras.src" in ast.unparse(node)
    ]
    for node, name in private_names(tree):
        receiver = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        if name not in OWN_NAMES and not (name in OVERRIDES and receiver == "super()"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not found, f"{path} uses private names of Keras: {found}"


@pytest.mark.matrix
def test_classes_override_no_private_name_of_keras() -> None:
    """But those listed, which `NRSModel` must."""
    found = set()
    for info in pkgutil.walk_packages([str(PACKAGE)], "keras_nrs."):
        if OTHER_BACKENDS & set(info.name.split(".")):
            continue
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            if cls.__module__ == keras_internals.__name__:
                continue
            of_keras = [b for b in cls.__mro__ if b.__module__.startswith("keras.")]
            found |= {
                name
                for name in filter(is_private, vars(cls))
                if any(name in vars(base) for base in of_keras)
            }
    assert found <= set(OVERRIDES)


@pytest.mark.only_jax
def test_threads_that_overlap_leave_batches_to_plain_keras() -> None:
    """Enter a, enter b, leave a, leave b, with plain Keras in a third thread."""
    from keras.src.backend.jax import trainer

    keras_function = trainer._distribute_data

    def placed(data: Any) -> Any:
        return trainer._distribute_data(data)

    def placed_on_four_devices() -> Any:
        with keras.distribution.DataParallel().scope():
            return placed(np.ones(3))

    with (
        ThreadPoolExecutor(1) as a,
        ThreadPoolExecutor(1) as b,
        ThreadPoolExecutor(1) as plain,
    ):
        in_a = keras_internals.placing_jax_batches(lambda data, layouts, place: "a")
        in_b = keras_internals.placing_jax_batches(
            lambda data, layouts, place: ("b", place(data, layouts))
        )

        def check(of_a: bool, of_b: bool) -> None:
            array = np.ones(3)
            assert (a.submit(placed, array).result() == "a") is of_a
            assert (a.submit(placed_on_four_devices).exception() is None) is of_a
            assert isinstance(b.submit(placed, array).result(), tuple) is of_b
            np.testing.assert_array_equal(plain.submit(placed, array).result(), array)
            assert plain.submit(placed_on_four_devices).exception() is not None

        check(False, False)
        a.submit(in_a.__enter__).result()
        check(True, False)
        b.submit(in_b.__enter__).result()
        check(True, True)
        a.submit(in_a.__exit__, None, None, None).result()
        check(False, True)
        b.submit(in_b.__exit__, None, None, None).result()
        check(False, False)
    assert trainer._distribute_data is keras_function


@pytest.mark.only_jax
def test_the_inner_of_two_contexts_places_batches() -> None:
    from keras.src.backend.jax import trainer

    keras_function = trainer._distribute_data
    with keras_internals.placing_jax_batches(lambda *_: "outer"):
        with keras_internals.placing_jax_batches(lambda *_: "inner"):
            assert trainer._distribute_data(None) == "inner"
        assert trainer._distribute_data(None) == "outer"
    assert trainer._distribute_data is keras_function
