"""Across modules: bad input is an error that says what to do, before training.

One table for all of the public API. What other test files have is not repeated here:
the arguments of `wrap()` one by one, options and models of `flatness`, and others.
"""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import scipy.sparse
from keras import layers

import keras_nrs
from keras_nrs import models as networks
from keras_nrs import nrs_objective
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import GaussianKL
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import FilterwiseBall
from keras_nrs.perturbations import RelativeBall
from tests.support.asserts import numpy_values
from tests.support.bad_input import LABELS
from tests.support.bad_input import NAN
from tests.support.bad_input import OTHERS
from tests.support.bad_input import SPARSE
from tests.support.bad_input import X
from tests.support.bad_input import Y
from tests.support.bad_input import Z
from tests.support.bad_input import branches
from tests.support.bad_input import fit
from tests.support.bad_input import linear
from tests.support.bad_input import row
from tests.support.bad_input import stateful
from tests.support.bad_input import train_on_batch
from tests.support.bad_input import without_weights
from tests.support.matrix import rest


def objective(y_true: Any = None, *outputs: Any, **options: Any) -> None:
    y_true = np.zeros(4, "int32") if y_true is None else y_true
    nrs_objective(y_true, *(outputs or (Z, Z)), **({"loss": SPARSE} | options))


def image_data(**options: Any) -> Any:
    """Of what is checked before a data set is prepared."""
    return pytest.importorskip("keras_nrs.data").ImageData(name="digits", **options)


WRAP = [
    row("huge eps", ValueError, "`eps` must be finite", fit, linear(), eps=10**400),
    row("eps in float64", ValueError, "`eps` must be at most", fit, linear(), eps=1e39),
    row("alpha", ValueError, "`alpha` must be at most", fit, linear(), alpha=1e39),
    row("beta", ValueError, "`beta` must be at most", fit, linear(), beta=1e39),
    row("huge beta", ValueError, "`beta` must be finite", fit, linear(), beta=10**400),
    row(
        "huge interval",
        ValueError,
        r"`interval` must be an integer from 1 to 2147483647\. Received",
        fit,
        linear(),
        interval=2**31,
    ),
    row(
        "many perturbations",
        ValueError,
        "`perturbations_per_replica` must be an integer from 1 to",
        fit,
        linear(),
        perturbations_per_replica=10**30,
    ),
    row("model=None", TypeError, r"`model` must be a keras\.Model", fit, None),
    row("class", TypeError, r"`model` must be a keras\.Model", fit, keras.Sequential),
    row("unwrap(None)", TypeError, "must be an NRSModel", keras_nrs.unwrap, None),
    row("config", ValueError, "`config` must be", keras_nrs.NRSModel.from_config, {}),
]

FITTING = [
    row(
        "uncompiled", ValueError, r"must call `compile\(\)`", fit, linear("uncompiled")
    ),
    row("no loss", ValueError, r"compile\(loss=", fit, linear(None)),
    row("no loss rpr", ValueError, r"compile\(loss=", fit, linear(None), scheme="rpr"),
    row(
        "no loss, but a divergence",
        ValueError,
        "`model` must have a loss|No loss to compute",
        fit,
        linear(None),
        divergence=GaussianKL(),
    ),
    row("alpha=0", ValueError, "knows no divergence", fit, linear("hinge"), alpha=0.0),
    row("cosine", ValueError, "knows no div", fit, linear("cosine_similarity")),
    row(
        "labels (8, 5)",
        ValueError,
        LABELS + r"\(\w+, 5\)",
        fit,
        linear(),
        X,
        X[:, [0] * 5],
    ),
    row(
        "labels of no rank",
        ValueError,
        LABELS,
        train_on_batch,
        linear(),
        X,
        np.ones((8, 2, 2)),
    ),
    row("no labels", ValueError, "`y` must be labels.*y=None", fit, linear(), X, None),
    row("labels of one output", ValueError, LABELS, fit, branches(), X, {"a": Y}),
    row("other names", ValueError, LABELS, fit, branches(), X, {"a": Y, "z": Y}),
    row(
        "metrics of one output with a loss",
        ValueError,
        OTHERS + ".*pass zeros",
        fit,
        branches(loss={"a": "mse"}, metrics={"a": ["mae"]}),
        X,
        {"a": Y},
    ),
    row(
        "stateful layer in groups",
        ValueError,
        "Batches must be divisible.*the stateful layer 'lstm'",
        fit,
        stateful(),
        perturbations_per_replica=2,
    ),
    row(
        "stateful layer and a fraction",
        ValueError,
        "Batches must be divisible.*the stateful layer 'lstm'",
        fit,
        stateful(),
        perturbed_fraction=0.5,
    ),
    row(
        "weights (8, 4)",
        ValueError,
        r"`sample_weight` must have the first axes",
        train_on_batch,
        linear(),
        X,
        Y,
        np.ones((8, 4)),
    ),
    row(
        "sparse labels for one-hot ones",
        ValueError,
        "indices of classes, without its last axis",
        fit,
        linear(SPARSE, outputs=3),
        X,
        np.ones((8, 3), "int32"),
    ),
    row("no samples", ValueError, "at least one sample", fit, linear(), X[:0], Y[:0]),
    row("x=None", ValueError, "at least one sample", fit, linear(), None, None),
    row(
        "empty batch",
        ValueError,
        "A batch must hold at least one sample",
        lambda: keras_nrs.wrap(linear()).train_on_batch(X[:0], Y[:0]),
    ),
    row(
        "axis beyond the outputs",
        ValueError,
        r"an axis 5\. Received: the shapes .* for CategoricalKL",
        fit,
        linear(),
        divergence=CategoricalKL(True, axis=5),
    ),
    row(
        "three divergences for two outputs",
        ValueError,
        "each of the model's 2 outputs",
        fit,
        branches(),
        X,
        {"a": Y, "b": Y[:, :1]},
        divergence=[GaussianKL()] * 3,
    ),
]

OBJECTIVE = [
    row("alpha=None", TypeError, "`alpha` must be a number", objective, alpha=None),
    row("alpha='a'", TypeError, "`alpha` must be a number", objective, alpha="a"),
    row("alpha=[1]", TypeError, "`alpha` must be a number", objective, alpha=[1.0]),
    row("alpha<0", ValueError, "`alpha` must be", objective, alpha=np.array(-1.0)),
    row("alphas", TypeError, "`alpha` must be a number", objective, alpha=np.ones(3)),
    row("loss=None", ValueError, "`loss` must be a keras", objective, loss=None),
    row("lists", ValueError, "must be tensors of the same", objective, 0, [1.0], [1.0]),
    row("shapes", ValueError, r"\(4, 3\) and \(2, 3\)", objective, None, Z, Z[:2]),
    row("labels", ValueError, LABELS + r"\(2,\)", objective, np.zeros(2, "int32")),
    row("weights", ValueError, "of shape", objective, sample_weight=np.ones(3)),
]

FILTERS = FilterwiseBall().sample
PERTURBATIONS = [
    row("rng=-1", ValueError, "`rng` must be", Ball().sample, [Z], 0.1, -1),
    row("rng=2**40", ValueError, "`rng` must be", Ball().sample, [Z], 0.1, 2**40),
    row("rng=True", TypeError, "`rng` must be", Ball().sample, [Z], 0.1, True),
    row("rng=None", TypeError, "`rng` must be an int", Ball().sample, [Z], 0.1, None),
    row("eps=None", TypeError, "`eps` must be a num", Ball().sample, [Z], None, 0),
    row("eps of weights", TypeError, "`eps` must be", Ball().sample, [Z], Z, 0),
    row("eps=nan", ValueError, "`eps` must be finite", Ball().sample, [Z], NAN, 0),
    row("a tensor", TypeError, "`weights` must be a list", Ball().sample, Z, 0.1, 0),
    row("None", TypeError, "`weights` must be", RelativeBall().sample, None, 0.1, 0),
    row("[None]", TypeError, "`weights` must be", RelativeBall().sample, [None], 1, 0),
    *(
        row(f"units={u}", ValueError, "`units` must be", FILTERS, [Z], 0.1, 0, units=u)
        for u in ([], [(2,)], [(-1,)], [1], 1, [(1,), (1,)])
    ),
]

DIVERGENCES = [
    row("from_logits=1", TypeError, "`from_logits` must be", CategoricalKL, 1),
    row("from_logits='no'", TypeError, "`from_logits` must be", BernoulliKL, "no"),
    row("axis=None", TypeError, "`axis` must be an integer", CategoricalKL, axis=None),
    row("axis='last'", TypeError, "`axis` must be an int", BernoulliKL, axis="last"),
    row("axis=nan", TypeError, "`axis` must be an integer", CategoricalKL, axis=NAN),
    row("reduction='x'", ValueError, "`reduction`", CategoricalKL, reduction="x"),
    *(
        row(f"{kl.name} of {id}", ValueError, "tensors of the same shape", kl, *pair)
        for kl in (CategoricalKL(), BernoulliKL(), GaussianKL())
        for id, pair in {
            "two shapes": (Z, Z[:, :1]),
            "nothing": (None, None),
            "scalars": (1.0, 1.0),
        }.items()
    ),
]
NETWORKS = [
    row("bool", ValueError, "`input_shape`", networks.resnet18, (True, 8, 3)),
    row("NaN", ValueError, "`input_shape`", networks.vgg16, (NAN, 8, 3)),
    row("unknown", ValueError, "`input_shape`", networks.vit, (None, None, 3)),
    row("classes", TypeError, "`num_classes`", networks.wide_resnet, (8, 8, 3), None),
    *(
        row(
            f"dropout of {make.__name__}",
            error,
            "`dropout` must be",
            make,
            dropout=rate,
        )
        for make, rate, error in (
            (networks.vgg16, 1.0, ValueError),
            (networks.vit, "a", TypeError),
            (networks.wide_resnet, -0.5, ValueError),
            (networks.imagenet_vgg16, NAN, ValueError),
        )
    ),
    row(
        "l2 of None", TypeError, "functional or sequential", networks.with_l2, None, 0.1
    ),
    row(
        "l2 of a wrapped model",
        TypeError,
        r"unwrap\(model\)",
        lambda: networks.with_l2(keras_nrs.wrap(linear()), 0.1),
    ),
    row("l2", ValueError, "`weight_decay` must be", networks.with_l2, linear(), NAN),
]

DATA = [
    row("batch_size", TypeError, "`batch_size` must be", image_data, batch_size="a"),
    row("image_size", ValueError, "`image_size` must be", image_data, image_size=0),
    row("smoothing", ValueError, "`label_smoothing`", image_data, label_smoothing=NAN),
    row("seed", ValueError, "`seed` must be", image_data, seed=-1),
    row("num_shards", TypeError, "`num_shards` must be", image_data, num_shards=None),
]


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        *FITTING,
        *rest(*WRAP, *OBJECTIVE, *PERTURBATIONS, *DIVERGENCES, *NETWORKS, *DATA),
    ],
)
@pytest.mark.usefixtures("in_tmp_path")
def test_bad_input(
    function: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=re.compile(match, re.DOTALL)):
        function()


@pytest.mark.not_torch  # Where Keras has no sparse inputs.
@pytest.mark.parametrize(
    "arguments", [{"perturbed_fraction": 0.5}, {"perturbations_per_replica": 2}]
)
def test_sparse_data_in_parts(arguments: dict[str, Any]) -> None:
    """An error where it has no slices: JAX has those of consecutive samples."""
    x = scipy.sparse.csr_matrix(X)
    model = keras.Sequential([keras.Input((3,), sparse=True), layers.Dense(2)])
    model.compile("sgd", "mse")
    nrs = keras_nrs.wrap(model, eps=0.1, **arguments)
    if keras.config.backend() == "jax" and "perturbations_per_replica" in arguments:
        nrs.fit(x, Y, shuffle=False, verbose=0)
        return
    with pytest.raises(ValueError, match=r"Batches must be divisible.*sparse data"):
        nrs.fit(x, Y, shuffle=False, verbose=0)


# What is handled.


def test_a_batch_of_one_with_batch_norm() -> None:
    """Its variance is 0: everywhere the outputs are those of the biases."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    nrs = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    logs = nrs.train_on_batch(X[:1], Y[:1], return_dict=True)
    assert all(np.isfinite(value) for value in logs.values())
    assert all(np.isfinite(w).all() for w in numpy_values(nrs.weights))


@pytest.mark.parametrize("scheme", ["nrs", *rest("rpr", "baseline")])
def test_a_model_without_weights(scheme: str) -> None:
    model = without_weights()
    nrs = keras_nrs.wrap(model, scheme=scheme)
    if keras.config.backend() == "jax":
        loss = nrs.train_on_batch(X, X)
    else:
        with pytest.warns(UserWarning, match="does not have any trainable"):
            loss = nrs.train_on_batch(X, X)
    assert np.ravel(loss)[0] == 0.0


@pytest.mark.matrix
def test_integers_of_numpy_are_integers() -> None:
    shape = (np.int64(8), np.int64(8), np.int64(1))
    model = networks.vit(shape, np.int64(3), size=(4, 1), depth=np.int64(1))
    assert model.output_shape == (None, 3)
