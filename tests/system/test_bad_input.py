"""What is not allowed is an error that says what to do, before anything is trained.

One table for all of the public API. What other test files have is not repeated here:
the arguments of `wrap()` one by one, options and models of `flatness`, and others.
"""

import errno
import json
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_nrs
from keras_nrs import flatness
from keras_nrs import models as networks
from keras_nrs import nrs_objective
from keras_nrs.callbacks import FlatnessMonitor
from keras_nrs.callbacks import NRSSchedule
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import GaussianKL
from keras_nrs.perturbations import Ball
from keras_nrs.perturbations import RelativeBall
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values

NAN = float("nan")
X = np.ones((8, 3), "float32")
Y = np.ones((8, 2), "float32")
Z = np.ones((4, 3), "float32")
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def linear(loss: Any = "mse", *, outputs: int = 2) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(outputs)], name="linear")
    if loss != "uncompiled":
        model.compile("sgd", loss)
    return model


def branches() -> keras.Model:
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, {"a": layers.Dense(2)(inputs), "b": layers.Dense(1)(inputs)}
    )
    model.compile("sgd", "mse")
    return model


def without_weights() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Activation("relu")])
    model.compile("sgd", "mse")
    return model


def spoiled() -> keras.Model:
    model = linear()
    model.set_weights([np.full_like(w, NAN) for w in model.get_weights()])
    return model


def fit(model: keras.Model, x: Any = X, y: Any = Y, **options: Any) -> None:
    """`fit()` of the wrapped model, which must not have changed if it fails."""
    arguments = {key: options.pop(key) for key in list(options) if key in FIT}
    nrs = keras_nrs.wrap(model, **options)
    before = numpy_values(nrs.weights)
    try:
        nrs.fit(x, y, verbose=0, **arguments)
    except Exception:
        assert_equal(numpy_values(nrs.weights), before)
        raise


def train_on_batch(model: keras.Model, *data: Any) -> None:
    """One step. In `fit()` TensorFlow's graphs have batches of any size."""
    keras_nrs.wrap(model).train_on_batch(*data)


FIT = ("callbacks", "sample_weight", "epochs", "batch_size")


def objective(y_true: Any = None, *outputs: Any, **options: Any) -> None:
    y_true = np.zeros(4, "int32") if y_true is None else y_true
    nrs_objective(y_true, *(outputs or (Z, Z)), **({"loss": SPARSE} | options))


def calibrated(model: keras.Model, x: Any = X, **options: Any) -> None:
    keras_nrs.calibrate_eps(model, x, **({"target_divergence": 0.1} | options))


def edited(change: Callable[[dict[str, Any]], Any]) -> Any:
    """A model from a file whose configuration was changed."""
    keras_nrs.wrap(linear()).save("model.keras")
    with zipfile.ZipFile("model.keras") as file:
        members = {name: file.read(name) for name in file.namelist()}
    config = json.loads(members["config.json"])
    change(config["config"])
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile("edited.keras", "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return keras.saving.load_model("edited.keras", compile=False)


def truncated(path: str) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path


def load_truncated_weights() -> None:
    nrs = keras_nrs.wrap(linear())
    nrs.save_weights("of.weights.h5")
    nrs.load_weights(truncated("of.weights.h5"))


def load_truncated_model() -> None:
    keras_nrs.wrap(linear()).save("model.keras")
    keras.saving.load_model(truncated("model.keras"))


def landscape() -> flatness.Landscape:
    return flatness.Landscape(coordinates=(np.arange(3.0),), losses=np.zeros(3))


def measure_from_truncated_checkpoint() -> None:
    landscape().save("a.npz")
    path = truncated("a.npz")
    flatness.loss_landscape(linear(), X, Y, num_points=3, checkpoint=path)


def density() -> flatness.SpectralDensity:
    ones = np.ones((1, 2))
    return flatness.SpectralDensity(
        nodes=ones, weights=ones / 2, size=2, num_products=2
    )


def image_data(**options: Any) -> Any:
    """Of what is checked before a data set is prepared."""
    return pytest.importorskip("keras_nrs.data").ImageData(name="digits", **options)


def row(
    id: str, error: type[Exception], match: str, function: Any, *args: Any, **kw: Any
) -> Any:
    return pytest.param(partial(function, *args, **kw), error, match, id=id)


LABELS = r"`y` must be labels that the loss can compare.*Received: y of shape "

WRAP = [
    row("huge eps", ValueError, "`eps` must be finite", fit, linear(), eps=10**400),
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

CALIBRATION = [
    row(
        "perturbation=''",
        ValueError,
        "`perturbation`",
        calibrated,
        linear(),
        perturbation="",
    ),
    row(
        "divergence=[]", ValueError, "`divergence`", calibrated, linear(), divergence=[]
    ),
    row("uncompiled", ValueError, r"compile\(loss=", calibrated, linear("uncompiled")),
    row("no weights", ValueError, "must have trainable", calibrated, without_weights()),
    row("NaN weights", ValueError, "must have finite outputs", calibrated, spoiled()),
    row(
        "NaN inputs",
        ValueError,
        "must have finite outputs",
        calibrated,
        linear(),
        X * NAN,
    ),
    row("seed", ValueError, "`seed` must be", calibrated, linear(), seed=2**31 - 1),
]

CALLBACKS = [
    row("eps=nan", ValueError, "`eps` must be finite", NRSSchedule, NAN),
    row(
        "warm-up", TypeError, "`warmup_epochs` must be", NRSSchedule, warmup_epochs=1.5
    ),
    row(
        "eps of an epoch",
        TypeError,
        "`eps` must be a number",
        fit,
        linear(),
        callbacks=[NRSSchedule(eps=lambda epoch: "a")],  # type: ignore[arg-type,return-value]
    ),
    row("x=None", TypeError, "`x` must be an array", FlatnessMonitor, None),
    row("x=[]", ValueError, "None where `x` is not arrays", FlatnessMonitor, [], Y),
    row("x of lists", TypeError, "`x` must be an array", FlatnessMonitor, X.tolist()),
    row("no data", ValueError, "at least one", FlatnessMonitor, X[:0], Y[:0]),
    row("5 labels", ValueError, "one number of samples", FlatnessMonitor, X, Y[:5]),
    row("list of labels", TypeError, "`y` must be an", FlatnessMonitor, X, Y.tolist()),
    row("no labels", ValueError, "`y` must be labels", FlatnessMonitor, X),
    row("k=1.5", TypeError, "`k` must be an integer", FlatnessMonitor, X, Y, k=1.5),
    row("eps=inf", ValueError, "`eps`", FlatnessMonitor, X, Y, eps=float("inf")),
    *(
        row(
            f"{name}={given}",
            ValueError,
            f"`{name}` must be a dict with keys among",
            FlatnessMonitor,
            X,
            Y,
            **{name: given},
        )
        for name in ("divergence_options", "eigenvalue_options")
        for given in (3, {"foo": 1}, {"k": 2})
    ),
    row(
        "monitor of many eigenvalues",
        ValueError,
        "`k` must be at most the number of selected weights, 8",
        lambda: fit(linear(), callbacks=[FlatnessMonitor(X, Y, k=9)]),
    ),
    row(
        "monitor of no variables",
        ValueError,
        "`variables` must be",
        lambda: fit(
            linear(),
            callbacks=[FlatnessMonitor(X, Y, eigenvalue_options={"variables": "a"})],
        ),
    ),
]

FLATNESS = [
    row(
        "no labels",
        ValueError,
        "`y` must be labels.*y=None",
        lambda: flatness.hessian_operator(linear(), X).to_dense(),
    ),
    row(
        "labels",
        ValueError,
        LABELS,
        lambda: flatness.hessian_operator(linear(), X, X[:, [0] * 5]).to_dense(),
    ),
    row(
        "landscape seed",
        TypeError,
        "`seed`",
        flatness.loss_landscape,
        linear(),
        X,
        Y,
        seed="a",
    ),
    *(
        row(
            f"directions={d}",
            TypeError,
            "`directions` must be",
            flatness.loss_landscape,
            linear(),
            X,
            Y,
            directions=d,
        )
        for d in (None, 1.5, True, [3])
    ),
    row(
        "vector",
        ValueError,
        r"shape \(8,\).*shape \(3,\)",
        lambda: flatness.hessian_operator(linear(), X, Y).split(np.ones(3)),
    ),
    row("damaged", ValueError, "or damaged", measure_from_truncated_checkpoint),
    row(
        "landscapes",
        TypeError,
        "`landscapes` must be a dict",
        flatness.draw_landscapes,
        [landscape()],
    ),
    row(
        "landscape of 3",
        TypeError,
        "`landscapes` must be a dict",
        flatness.draw_landscapes,
        {"a": 3},
    ),
    row("no landscape", TypeError, "at least one", flatness.draw_landscapes, {}),
    row("no density", TypeError, "at least one", flatness.draw_densities, {}),
    row("densities", TypeError, "`densities` must be", flatness.draw_densities, [3]),
    row(
        "bandwidth=0",
        ValueError,
        "`bandwidth` must be > 0",
        lambda: density().plot(bandwidth=0),
    ),
    row(
        "moment", TypeError, "`order` must be an integer", lambda: density().moment("a")
    ),
    row(
        "divergence=''",
        ValueError,
        "`divergence`",
        flatness.model_divergence,
        linear(),
        X,
        eps=0.1,
        divergence="",
    ),
    row(
        "divergence eps",
        ValueError,
        "`eps`",
        flatness.model_divergence,
        linear(),
        X,
        eps=NAN,
    ),
    row(
        "interpolate",
        TypeError,
        "`model` must be a",
        flatness.interpolate,
        linear(),
        None,
        X,
        Y,
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

FILES = [
    row(
        "newer",
        ValueError,
        "`config` must be .*'future'",
        edited,
        lambda c: c.update(future=1),
    ),
    row(
        "no model",
        ValueError,
        "`config` must be .*'base_model'",
        edited,
        lambda c: c.pop("base_model"),
    ),
    row(
        "scheme",
        ValueError,
        "`scheme` must be",
        edited,
        lambda c: c.update(scheme="sam"),
    ),
    row(
        "eps", TypeError, "`eps` must be a number", edited, lambda c: c.update(eps="a")
    ),
    row("truncated model", ValueError, "accessible `.keras` zip", load_truncated_model),
    row("truncated weights", OSError, "truncated file", load_truncated_weights),
    row(
        "ending",
        ValueError,
        "filepath=weights.keras",
        lambda: keras_nrs.wrap(linear()).save_weights("weights.keras"),
    ),
    row(
        "no ending",
        ValueError,
        "filepath=model",
        lambda: keras_nrs.wrap(linear()).save("model"),
    ),
    row("no path", TypeError, "PathLike", lambda: keras_nrs.wrap(linear()).save(None)),
]


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        *WRAP,
        *FITTING,
        *OBJECTIVE,
        *PERTURBATIONS,
        *DIVERGENCES,
        *CALIBRATION,
        *CALLBACKS,
        *FLATNESS,
        *NETWORKS,
        *DATA,
        *FILES,
    ],
)
def test_bad_input(
    function: Callable[[], Any],
    error: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.compile(match, re.DOTALL)):
        function()


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


@pytest.mark.parametrize("scheme", ["nrs", "rpr", "baseline"])
def test_a_model_without_weights(scheme: str) -> None:
    model = without_weights()
    nrs = keras_nrs.wrap(model, scheme=scheme)
    if keras.config.backend() == "jax":
        loss = nrs.train_on_batch(X, X)
    else:
        with pytest.warns(UserWarning, match="does not have any trainable"):
            loss = nrs.train_on_batch(X, X)
    assert np.ravel(loss)[0] == 0.0


def test_a_file_of_an_older_version_has_the_defaults_of_new_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = ("memory_efficient", "perturbed_fraction", "divergence", "seed")
    loaded = edited(lambda config: [config.pop(name) for name in new])
    assert loaded.get_config()["divergence"] == "auto"
    assert (loaded.memory_efficient, loaded.perturbed_fraction) == (False, 1.0)


@pytest.mark.parametrize("name", ["nrs.keras", "nrs.weights.h5"])
def test_a_full_disk_leaves_the_old_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other."""
    path = tmp_path / name
    nrs = keras_nrs.wrap(linear())
    save = nrs.save if path.suffix == ".keras" else nrs.save_weights
    save(path)
    old = path.read_bytes()
    writes = []

    def full(self: Any, store: Any) -> None:
        writes.append(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras_nrs.NRSModel, "save_own_variables", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(path)
    assert writes
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_failed_load_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nrs = keras_nrs.wrap(linear())
    nrs.save_weights("of.weights.h5")
    nrs.eps = 0.7
    before = numpy_values(nrs.variables)
    with pytest.raises(OSError, match="truncated file"):
        nrs.load_weights(truncated("of.weights.h5"))
    assert_equal(numpy_values(nrs.variables), before)
    assert float(ops.convert_to_numpy(nrs.eps)) == np.float32(0.7)


def test_integers_of_numpy_are_integers() -> None:
    shape = (np.int64(8), np.int64(8), np.int64(1))
    model = networks.vit(shape, np.int64(3), size=(4, 1), depth=np.int64(1))
    assert model.output_shape == (None, 3)
