"""The divergence of each output of a model, chosen from its loss."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common.masking import set_keras_mask

import keras_nrs
from keras_nrs.divergences import BernoulliKL
from keras_nrs.divergences import CategoricalKL
from keras_nrs.divergences import Divergence
from keras_nrs.divergences import GaussianKL
from keras_nrs.step import output_divergences
from tests.support.arrays import ULP
from tests.support.arrays import tensor
from tests.support.arrays import to_numpy
from tests.support.divergences import categorical
from tests.support.divergences import log_softmax
from tests.support.divergences import logits
from tests.support.divergences import rounding

REDUCTIONS = ("sum", "sum_over_batch_size")
LOGITS = keras.KerasTensor((None, 5))
CHOICES = {
    "categorical_crossentropy": CategoricalKL,
    "sparse_categorical_crossentropy": CategoricalKL,
    "categorical_focal_crossentropy": CategoricalKL,
    "kl_divergence": CategoricalKL,
    "binary_crossentropy": BernoulliKL,
    "binary_focal_crossentropy": BernoulliKL,
    "mean_squared_error": GaussianKL,
    "mean_absolute_error": GaussianKL,
    "mean_absolute_percentage_error": GaussianKL,
    "mean_squared_logarithmic_error": GaussianKL,
    "huber": GaussianKL,
    "log_cosh": GaussianKL,
}
INSTANCES = [
    (keras.losses.CategoricalCrossentropy, CategoricalKL),
    (keras.losses.SparseCategoricalCrossentropy, CategoricalKL),
    (keras.losses.CategoricalFocalCrossentropy, CategoricalKL),
    (keras.losses.KLDivergence, CategoricalKL),
    (keras.losses.BinaryCrossentropy, BernoulliKL),
    (keras.losses.BinaryFocalCrossentropy, BernoulliKL),
    (keras.losses.MeanSquaredError, GaussianKL),
    (keras.losses.MeanAbsoluteError, GaussianKL),
    (keras.losses.MeanAbsolutePercentageError, GaussianKL),
    (keras.losses.MeanSquaredLogarithmicError, GaussianKL),
    (keras.losses.Huber, GaussianKL),
    (keras.losses.LogCosh, GaussianKL),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "expected"), CHOICES.items())
def test_choice_for_a_function(name: str, expected: type[Divergence]) -> None:
    chosen = output_divergences.for_loss(keras.losses.get(name), LOGITS)
    assert type(chosen) is expected
    assert not getattr(chosen, "from_logits", False)
    assert chosen.reduction == "sum_over_batch_size"


@pytest.mark.matrix
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("loss", "expected"), INSTANCES)
def test_choice_for_an_instance(
    loss: type[keras.losses.Loss], expected: type[Divergence], reduction: str
) -> None:
    chosen = output_divergences.for_loss(loss(reduction=reduction), LOGITS)
    assert type(chosen) is expected
    assert not getattr(chosen, "from_logits", False)
    assert chosen.reduction == reduction


@pytest.mark.matrix
@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.CategoricalCrossentropy,
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.CategoricalFocalCrossentropy,
        keras.losses.BinaryCrossentropy,
        keras.losses.BinaryFocalCrossentropy,
    ],
)
def test_choice_follows_from_logits_and_axis(loss: type[keras.losses.Loss]) -> None:
    chosen: Any = output_divergences.for_loss(loss(from_logits=True, axis=1), LOGITS)
    assert chosen.from_logits
    assert chosen.axis == 1


@pytest.mark.matrix
def test_choice_for_a_subclass_of_a_loss() -> None:
    class Smooth(keras.losses.CategoricalCrossentropy):
        pass

    chosen: Any = output_divergences.for_loss(Smooth(from_logits=True), LOGITS)
    assert type(chosen) is CategoricalKL
    assert chosen.from_logits


def my_loss(y_true: Any, y_pred: Any) -> Any:
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


class MyLoss(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return my_loss(y_true, y_pred)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("loss", "name"),
    [(my_loss, "my_loss"), (MyLoss(), "MyLoss"), (keras.losses.Poisson(), "poisson")],
)
def test_unknown_loss_is_named(loss: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"loss '{name}'.*GaussianKL"):
        output_divergences.for_loss(loss, LOGITS)


def output_of(*layers: keras.layers.Layer) -> Any:
    return keras.Sequential([keras.Input((5,)), *layers]).outputs[0]


@pytest.mark.matrix
@pytest.mark.parametrize("loss", [my_loss, MyLoss(reduction="sum")])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([keras.layers.Dense(3, activation="softmax")], CategoricalKL),
        ([keras.layers.Dense(3), keras.layers.Softmax()], CategoricalKL),
        ([keras.layers.Dense(3), keras.layers.Activation("softmax")], CategoricalKL),
        ([keras.layers.Dense(3, activation="sigmoid")], BernoulliKL),
    ],
)
def test_choice_by_activation(
    loss: Any, layers: list[keras.layers.Layer], expected: type[Divergence]
) -> None:
    chosen: Any = output_divergences.for_loss(loss, output_of(*layers))
    assert type(chosen) is expected
    assert not chosen.from_logits
    assert chosen.reduction == getattr(loss, "reduction", "sum_over_batch_size")


def sparse(y_true: Any, y_pred: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, True)


def masked(y_true: Any, y_pred: Any) -> Any:
    """Without the class 0, as for padded sequences: a scalar."""
    mask = ops.cast(ops.squeeze(y_true) != 0, y_pred.dtype)
    return ops.sum(sparse(y_true, y_pred) * mask) / ops.sum(mask)


class Sparse(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return sparse(y_true, y_pred)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "loss", [sparse, masked, Sparse(reduction="sum"), Sparse(dtype="bfloat16")]
)
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_choice_by_integer_labels(shape: tuple[int, ...], loss: Any) -> None:
    labels = np.zeros(shape, "int32")
    chosen: Any = output_divergences.for_loss(
        loss, output_of(keras.layers.Dense(3)), labels
    )
    assert type(chosen) is CategoricalKL
    assert chosen.from_logits


def pinball(y_true: Any, y_pred: Any) -> Any:
    """Of three quantiles of a count."""
    error = ops.reshape(ops.cast(y_true, y_pred.dtype), (-1, 1)) - y_pred
    quantiles = ops.convert_to_tensor([0.1, 0.5, 0.9])
    return ops.mean(ops.maximum(quantiles * error, (quantiles - 1) * error), axis=-1)


def ordinal(y_true: Any, y_pred: Any) -> Any:
    """Of ranks, as the number of thresholds that they pass."""
    passed = ops.reshape(y_true, (-1, 1)) > ops.arange(3, dtype=y_true.dtype)
    return keras.losses.binary_crossentropy(
        ops.cast(passed, y_pred.dtype), y_pred, from_logits=True
    )


@pytest.mark.matrix
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize(
    "loss", [pinball, ordinal, keras.losses.CategoricalGeneralizedCrossEntropy()]
)
def test_integers_that_are_no_classes_of_logits(
    loss: Any, shape: tuple[int, ...], batch_size: int | None
) -> None:
    """Where a program is compiled, too."""
    inputs = keras.Input((5,), batch_size=batch_size)
    model = keras.Sequential([inputs, keras.layers.Dense(3)])
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match="divergence='auto' knows no divergence"):
        keras_nrs.wrap(model).train_on_batch(X, np.ones(shape, "int32"))


def test_a_loss_of_logits_is_known_where_a_program_is_compiled() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile("sgd", sparse)
    nrs = keras_nrs.wrap(model, eps=1.0)
    logs = nrs.train_on_batch(X, np.ones(4, "int32"), return_dict=True)
    divergence = logs["model_divergence"]
    assert divergence > 0


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("units", "activation", "labels"),
    [
        (3, None, np.zeros((4,))),  # Not integers.
        (3, "relu", np.zeros((4,), "int32")),  # No logits.
        (3, None, np.zeros((4, 3), "int32")),  # No indices.
        (1, None, np.zeros((4,), "int32")),  # No classes.
    ],
)
def test_other_labels_decide_nothing(
    units: int, activation: str | None, labels: np.ndarray
) -> None:
    output = output_of(keras.layers.Dense(units, activation=activation))
    with pytest.raises(ValueError, match="loss 'my_loss'"):
        output_divergences.for_loss(my_loss, output, labels)


def test_probabilities_from_an_operation_are_not_taken_for_logits() -> None:
    inputs = keras.Input((5,))
    output = ops.softmax(keras.layers.Dense(3)(inputs))
    try:
        chosen: Any = output_divergences.for_loss(my_loss, output, np.zeros(4, "int32"))
    except ValueError:
        return
    assert not chosen.from_logits


X = logits(3, (4, 5))


# All outputs of a model.


def two_outputs(as_dict: bool = False) -> keras.Model:
    inputs = keras.Input((5,))
    # Not in alphabetical order, in which dicts are flattened.
    digit = keras.layers.Dense(3, name="digit")(inputs)
    angle = keras.layers.Dense(2, name="angle")(inputs)
    outputs = {"digit": digit, "angle": angle} if as_dict else [digit, angle]
    return keras.Model(inputs, outputs)


def summary(chosen: list[output_divergences.OutputDivergence]) -> dict[Any, Any]:
    return {c.paths[0]: (type(c.divergence), c.weight) for c in chosen}


CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DIGITS, ANGLES = np.array([0, 1, 2, 1]), logits(4, (4, 2))


def test_one_output() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(loss=CROSSENTROPY)
    outputs, perturbed = model(X), tensor(logits(1, (4, 3)))
    chosen = output_divergences.for_model(model, "auto", outputs, DIGITS)
    assert summary(chosen) == {(): (CategoricalKL, None)}
    value = output_divergences.total_divergence(
        chosen, DIGITS, outputs, perturbed, None
    )
    expected = CategoricalKL(True)(outputs, perturbed)
    np.testing.assert_array_equal(to_numpy(value), to_numpy(expected))


@pytest.mark.matrix
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("targets", [None, [DIGITS, ANGLES]])
def test_list_of_outputs(targets: Any, trained: bool) -> None:
    model = two_outputs()
    model.compile(loss=[CROSSENTROPY, "mse"], loss_weights=[2.0, 0.5])
    if trained:
        model.evaluate(X, [DIGITS, ANGLES], verbose=0)
    chosen = output_divergences.for_model(model, "auto", model(X), targets)
    assert summary(chosen) == {(0,): (CategoricalKL, 2.0), (1,): (GaussianKL, 0.5)}


@pytest.mark.matrix
@pytest.mark.parametrize("as_dict", [False, True])
def test_dict_of_losses(as_dict: bool) -> None:
    model = two_outputs(as_dict)
    model.compile(
        loss={"angle": "mse", "digit": CROSSENTROPY},
        loss_weights={"angle": 0.5, "digit": 2.0},
    )
    outputs = model(X)
    chosen = output_divergences.for_model(model, "auto", outputs)
    digit, angle = (("digit",), ("angle",)) if as_dict else ((0,), (1,))
    assert summary(chosen) == {digit: (CategoricalKL, 2.0), angle: (GaussianKL, 0.5)}

    perturbed = keras.tree.map_structure(lambda y: 2 * y, outputs)
    weights = {"digit": np.array([1.0, 0.0, 0.0, 2.0]), "angle": np.ones(4)}
    if not as_dict:
        weights = [weights["digit"], weights["angle"]]
    value = output_divergences.total_divergence(
        chosen, None, outputs, perturbed, weights
    )
    parts = [
        CategoricalKL(True)(
            outputs[digit[0]],
            perturbed[digit[0]],
            tensor([1.0, 0.0, 0.0, 2.0]),
        ),
        GaussianKL()(outputs[angle[0]], perturbed[angle[0]]),
    ]
    expected = 2.0 * to_numpy(parts[0]) + 0.5 * to_numpy(parts[1])
    np.testing.assert_allclose(to_numpy(value), expected, rtol=4 * ULP)


def test_dict_of_targets_for_a_list_of_outputs() -> None:
    model = two_outputs()
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    targets = {"angle": ANGLES, "digit": DIGITS}
    assert model.evaluate(X, targets, verbose=0)  # Keras takes them.
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    chosen = output_divergences.for_model(model, "auto", model(X), targets)
    assert summary(chosen) == {(0,): (CategoricalKL, None), (1,): (GaussianKL, None)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_an_output_without_a_loss_does_not_count(as_dict: bool) -> None:
    model = two_outputs(as_dict)
    model.compile(loss={"digit": CROSSENTROPY} if as_dict else [CROSSENTROPY, None])
    chosen = output_divergences.for_model(model, "auto", model(X))
    path = ("digit",) if as_dict else (0,)
    assert summary(chosen) == {path: (CategoricalKL, None)}


def test_activations_are_found_through_the_model() -> None:
    inputs = keras.Input((5,))
    outputs = {
        "b": keras.layers.Dense(3, activation="softmax")(inputs),
        "a": keras.layers.Dense(2, activation="sigmoid")(inputs),
    }
    model = keras.Model(inputs, outputs)
    model.compile(loss={"a": my_loss, "b": my_loss})
    chosen = output_divergences.for_model(model, "auto", model(X))
    assert summary(chosen) == {
        ("a",): (BernoulliKL, None),
        ("b",): (CategoricalKL, None),
    }


def test_one_divergence_for_all_outputs() -> None:
    model = two_outputs()
    model.compile(loss=[CROSSENTROPY, "mse"])
    mine = GaussianKL(3.0)
    chosen = output_divergences.for_model(model, mine, model(X))
    assert [c.divergence for c in chosen] == [mine, mine]


def test_a_model_without_a_loss() -> None:
    model = two_outputs()
    mine = GaussianKL(3.0)
    chosen = output_divergences.for_model(model, mine, model(X))
    assert [(c.paths[0], c.divergence) for c in chosen] == [((0,), mine), ((1,), mine)]
    with pytest.raises(ValueError, match=r"compiled with a loss.*compile\(loss="):
        output_divergences.for_model(model, "auto", model(X))


def test_a_loss_of_a_structure_of_outputs() -> None:
    """It weighs each output in it, of which activations tell the kind."""
    inputs = keras.Input((5,))
    a = keras.layers.Dense(3, activation="softmax")(inputs)
    b = keras.layers.Dense(2, activation="sigmoid")(inputs)
    model = keras.Model(inputs, {"both": (a, b), "alone": b})

    def of_both(y: Any, y_pred: Any) -> Any:
        return sum(ops.mean(ops.square(t - p)) for t, p in zip(y, y_pred, strict=True))

    model.compile(loss={"both": of_both, "alone": "mse"}, loss_weights=[0.5, 2.0])
    outputs = model(X)
    chosen = output_divergences.for_model(model, "auto", outputs)
    assert summary(chosen) == {
        ("both", 0): (CategoricalKL, 2.0),
        ("both", 1): (BernoulliKL, 2.0),
        ("alone",): (GaussianKL, 0.5),
    }
    # Losses of all outputs may stand beside each other.
    model.compile(loss=[of_both, {"both": of_both, "alone": None}])
    assert len(output_divergences.for_model(model, GaussianKL(), outputs)) == 3


class SplitsItsOutput(keras.Model):
    """Its losses are of what it makes of its output, not of its output."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, *args: Any, **kw: Any) -> Any:
        return super().compute_loss(x, y, [y_pred[:, :1], y_pred[:, 1:]], *args, **kw)


def test_losses_of_no_output() -> None:
    inputs = keras.Input((5,))
    model = SplitsItsOutput(inputs, keras.layers.Dense(3)(inputs))
    model.compile(loss=["mse", "mae"])
    model.evaluate(X, [X[:, :1], X[:, 1:3]], verbose=0)
    with pytest.raises(ValueError, match="compiled with a loss of its outputs"):
        output_divergences.for_model(model, "auto", model(X))
    mine = GaussianKL()
    (chosen,) = output_divergences.for_model(model, mine, model(X))
    assert (chosen.paths[0], chosen.divergence) == ((), mine)


def test_list_of_divergences() -> None:
    model = two_outputs()
    model.compile(loss=["mse", "mse"])
    chosen = output_divergences.for_model(model, [CategoricalKL(True), None], model(X))
    assert summary(chosen) == {(0,): (CategoricalKL, None)}


def test_dict_of_divergences() -> None:
    model = two_outputs(as_dict=True)
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    given = {"digit": CategoricalKL(True), "angle": GaussianKL(2.0)}
    chosen = output_divergences.for_model(model, given, model(X))
    assert {c.paths[0][0]: c.divergence for c in chosen} == given
    chosen = output_divergences.for_model(model, {"digit": given["digit"]}, model(X))
    assert {c.paths[0][0]: c.divergence for c in chosen} == {"digit": given["digit"]}


def test_dict_of_divergences_for_a_list_of_outputs() -> None:
    """By the names of the outputs, as losses are: not in alphabetical order."""
    model = two_outputs()
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    given = {"digit": CategoricalKL(True), "angle": GaussianKL(2.0)}
    chosen = output_divergences.for_model(model, given, model(X))
    assert summary(chosen) == {(0,): (CategoricalKL, None), (1,): (GaussianKL, None)}


@pytest.mark.matrix
def test_a_divergence_for_an_unknown_output() -> None:
    model = two_outputs(as_dict=True)
    model.compile(loss={"angle": "mse", "digit": CROSSENTROPY})
    with pytest.raises(ValueError, match=r"digits"):
        output_divergences.for_model(model, {"digits": CategoricalKL(True)}, model(X))


@pytest.mark.matrix
def test_wrong_number_of_divergences() -> None:
    model = two_outputs()
    model.compile(loss=["mse", "mse"])
    with pytest.raises(ValueError, match=r"model's 2 outputs. Received: divergence="):
        output_divergences.for_model(model, [GaussianKL()] * 3, model(X))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "divergence", ["kl", None, 3, [], ["auto"], [None], GaussianKL]
)
def test_what_cannot_be_a_divergence(divergence: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto'.*Received: divergence="):
        output_divergences.check_divergence(divergence)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "divergence", ["auto", GaussianKL(), [GaussianKL(), None], {"a": GaussianKL()}]
)
def test_what_can_be_a_divergence(divergence: Any) -> None:
    assert output_divergences.check_divergence(divergence) is divergence


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 3, 4)])
def test_ignored_classes_do_not_count(
    shape: tuple[int, ...], reduction: str, masked: bool, weighted: bool
) -> None:
    """Weighted as in the loss: it is log(3) at each position of equal logits."""
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=1, reduction=reduction
    )
    positions = shape[:-1] if shape[-1] == 1 else shape
    model = keras.Sequential([keras.Input((*positions[1:], 5)), keras.layers.Dense(3)])
    model.compile(loss=loss)
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=shape)
    weights = rng.uniform(size=positions) if weighted else None  # Float64: copied.
    # The same at every position, so that the loss tells what counts.
    p, q = (np.tile(logits(s, (3,)), (*positions, 1)) for s in (0, 1))
    perturbed, equal = tensor(q), tensor(np.zeros_like(q))
    if masked:
        mask = ops.convert_to_tensor(rng.uniform(size=positions) > 0.3)
        set_keras_mask(perturbed, mask)
        set_keras_mask(equal, mask)
    chosen = output_divergences.for_model(model, "auto", tensor(p), labels)
    value = float(
        output_divergences.total_divergence(
            chosen, labels, tensor(p), perturbed, weights
        )
    )
    counted = float(loss(labels, equal, weights)) / math.log(3)
    expected = counted * float(categorical(log_softmax(p), log_softmax(q)).flat[0])
    # Sums of up to 24 positive numbers on both sides.
    atol = max(counted, 1) * rounding(p, q, 3)
    assert value == pytest.approx(expected, rel=100 * ULP, abs=atol)
