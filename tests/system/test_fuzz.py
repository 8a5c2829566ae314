"""Across modules: what must hold for random networks, options and data.

The suite runs a few cases, always the same ones. For more, at random:

    KERAS_NRS_FUZZ_EXAMPLES=500 python -m pytest -m slow tests/system/test_fuzz.py
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_nrs
from keras_nrs import perturbations
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.cases import Case
from tests.support.cases import Options
from tests.support.cases import fit_arguments
from tests.support.cases import make_batches
from tests.support.cases import make_model

# What is checked.


def trained(case: Case, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model after two steps, and the history; wrapped if there are options."""
    keras.utils.set_random_seed(1)
    model = make_model(case)
    if options:
        model = keras_nrs.wrap(model, seed=2, **options)
    keras.utils.set_random_seed(3)
    arguments = fit_arguments(case, make_batches(case))
    history = model.fit(**arguments, shuffle=False, verbose=0)
    return model, history.history


def values(model: Any) -> list[np.ndarray]:
    return numpy_values(model.variables + model.optimizer.variables)


def check_baseline_is_bare_keras(case: Case, bare: Any, history: Any) -> None:
    """Bit for bit: weights, random states, optimizer and history."""
    baseline, own_history = trained(
        case, **case.options.arguments() | {"scheme": "baseline", "clean_pass": False}
    )
    assert_equal(values(baseline.base_model), values(bare))
    assert own_history == history


def check_saving(case: Case, nrs: Any, batch: Any) -> None:
    """A saved model is the same."""
    # Keras does not save the dtype of a Sequential model, which has no effect.
    keeps_dtype = case.policy == "float32" or "nested" not in case.blocks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nrs.keras"
        nrs.save(path)
        loaded = keras.saving.load_model(path)
    assert_equal(values(loaded), values(nrs))
    # As JSON: a file has no tuples.
    configs = [[m.get_config(), m.get_compile_config()] for m in (nrs, loaded)]
    if not keeps_dtype:
        for config, _ in configs:
            del config["base_model"]
    first, second = map(json.dumps, configs)
    assert first == second
    predictions = [
        keras.tree.map_structure(ops.convert_to_numpy, m(batch[0], training=False))
        for m in (nrs, loaded)
    ]
    keras.tree.assert_same_structure(*predictions)
    assert_equal(*map(keras.tree.flatten, predictions))


def penalties_of(model: Any) -> float:
    """The sum of the weights' penalties."""
    with keras.StatelessScope():  # Without the losses that layers added.
        losses = model.losses
    return float(sum(float(ops.convert_to_numpy(loss)) for loss in losses))


def bare_loss(bare: Any, model: Any, batch: Any) -> float:
    """L(theta), penalties included, as Keras computes it at the next step."""
    for own, other in zip(bare.variables, model.variables, strict=True):
        own.assign(ops.convert_to_numpy(other))
    keras.utils.set_random_seed(4)
    bare.reset_metrics()
    return float(bare.train_on_batch(*batch, return_dict=True)["loss"])


def check_terms(case: Case, bare: Any, nrs: Any, batch: Any, eps: float) -> None:
    """Of a perturbed step: the loss is what Equation 3 says, of the terms reported."""
    options = case.options
    nrs.eps = eps
    seed, _ = numpy_values([nrs.seed_generator.state])[0]
    nrs.seed_generator.state.assign([seed, 0])  # A step on `interval`'s schedule.
    penalty = penalties_of(nrs.base_model)
    clean = bare_loss(bare, nrs.base_model, batch) - penalty
    keras.utils.set_random_seed(4)
    nrs.reset_metrics()
    logs = nrs.train_on_batch(*batch, return_dict=True)
    total = float(logs["loss"])
    divergence = float(logs.get("model_divergence", 0.0))
    perturbed = float(logs["perturbed_loss"])
    scale = 1 + max(
        abs(term)
        for term in (clean, penalty, options.alpha * divergence, perturbed, total)
    )
    # A thousand roundings of float32, and some of bfloat16, of the largest term.
    is_float32 = case.policy == "float32"
    bound = scale * (1000 * 2.0**-24 if is_float32 else 16 * 2.0**-9)
    is_perturbed = options.scheme == "rpr" or options.alpha > 0 or options.beta > 0
    if not is_perturbed:
        assert divergence == perturbed == 0
    if options.scheme == "rpr":
        assert total == pytest.approx(perturbed + penalty, abs=bound)
    else:
        regularizers = options.alpha * divergence + options.beta * perturbed
        factor = 1 + options.beta if options.normalize else 1
        if case.clean_pass_is_bare:
            expected = penalty + (clean + regularizers) / factor
            assert total == pytest.approx(expected, abs=bound)
        # What is left of the total is L(theta), in whatever groups.
        clean = factor * (total - penalty) - regularizers
    if eps == 0 and is_perturbed:
        check_nothing_perturbed(case, divergence, perturbed, clean, bound)


def check_nothing_perturbed(
    case: Case, divergence: float, perturbed: float, clean: float, bound: float
) -> None:
    options = case.options
    assert divergence == pytest.approx(
        0, abs=bound if case.policy != "float32" else 1e-6
    )
    is_whole = options.perturbed_fraction == 1
    clean_is_known = case.clean_pass_is_bare or options.scheme == "nrs"
    if is_whole and clean_is_known:
        assert perturbed == pytest.approx(clean, abs=(2 + options.beta) * bound)


def check(case: Case) -> None:
    batches = make_batches(case)
    bare, history = trained(case)
    check_baseline_is_bare_keras(case, bare, history)
    nrs, _ = trained(case, **case.options.arguments())
    assert all(np.isfinite(value).all() for value in values(nrs))
    check_saving(case, nrs, batches[0])
    for eps in (case.options.eps, 0.0):
        check_terms(case, bare, nrs, batches[0], eps)


BLOCKS = [
    *["dense", "conv", "batch_norm", "layer_norm", "dropout", "unseeded_dropout"],
    *["noise", "attention", "gru", "lstm", "shared", "penalty", "activity", "frozen"],
    *["constrained", "prelu", "nested"],
]
LOSSES = ["sparse", "softmax", "focal", "binary", "sigmoid", "mse", "huber"]
LOSSES += ["log_cosh", "sum"]
# Not Adafactor: Keras's gives NaN where most of a gradient is exactly 0.
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw", "rmsprop", "lion", "adagrad"]
OPTIMIZERS += ["accumulating"]
# Radii of about a third of the weights' norm.
EPS = {"ball": 1.0, "relative": 0.3, "layerwise": 0.2, "released": 0.1}
EPS |= {"filterwise": 0.2, "elementwise": 0.2}


@st.composite
def all_options(draw: Any) -> Options:
    perturbation = draw(st.sampled_from(sorted(EPS)))
    radii = [None, *perturbations.RADII]
    coefficients = st.sampled_from([1.0, 0.0, 0.5, 3.0])
    scheme = draw(st.sampled_from(["nrs", "nrs", "rpr"]))
    fraction = draw(st.sampled_from([1.0, 1.0, 0.5, 0.2]))
    return Options(
        scheme=scheme,
        perturbation=perturbation,
        radius=draw(st.sampled_from(radii)),
        noise=draw(st.sampled_from(perturbations.NOISES)),
        eps=EPS[perturbation],
        alpha=draw(coefficients),
        beta=draw(coefficients),
        interval=draw(st.sampled_from([1, 1, 2, 3])),
        normalize=draw(st.booleans()),
        perturbed_fraction=fraction,
        memory_efficient=draw(st.booleans()),
        clean_pass=scheme == "rpr" and (fraction < 1 or draw(st.booleans())),
        perturbations_per_replica=draw(st.sampled_from([1, 1, 2, 5])),
    )


FORMATS = ["arrays", "generator", "PyDataset", "tf.data", "DataLoader"]
IS_JAX = keras.config.backend() == "jax"
CASES = st.builds(
    Case,
    source=st.sampled_from(["vector", "image", "sequence", "tokens", "masked_tokens"]),
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=3).map(tuple),
    heads=st.lists(st.sampled_from(LOSSES), min_size=1, max_size=2).map(tuple),
    pooled=st.booleans(),
    structure=st.sampled_from(["list", "dict"]),
    second_input=st.booleans(),
    optimizer=st.sampled_from(OPTIMIZERS),
    policy=st.sampled_from(["float32", "mixed_bfloat16"]),
    # JAX compiles each operation, which takes much longer than a step.
    run_eagerly=st.sampled_from([False] * (9 if IS_JAX else 1) + [True]),
    data=st.sampled_from(FORMATS),
    sizes=st.sampled_from([(4, 4), (5, 3), (3, 1)]),
    weighted=st.booleans(),
    options=all_options(),
)
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
# With a random eps it may well be inert.
ignore_inert_eps = pytest.mark.filterwarnings("ignore:eps=:UserWarning")
# What failed once: groups after the first had other masks in the clean pass.
UNSEEDED = Case(
    blocks=("unseeded_dropout",),
    options=Options(perturbations_per_replica=2, perturbed_fraction=0.5),
)
# Compiling takes most of the time, and much more of it than running on PyTorch.
FEW = {"jax": 1, "tensorflow": 2, "torch": 15}[keras.config.backend()]


@pytest.mark.matrix
@ignore_inert_eps
@settings(max_examples=FEW, derandomize=True, **COMMON)
@given(CASES)
@example(UNSEEDED)
def test_what_must_always_hold(case: Case) -> None:
    check(case)


@pytest.mark.slow
@ignore_inert_eps
@settings(max_examples=int(os.environ.get("KERAS_NRS_FUZZ_EXAMPLES", "300")), **COMMON)
@given(CASES)
def test_what_must_hold_in_many_more_cases(case: Case) -> None:
    check(case)
    keras.utils.clear_session(free_memory=True)
