"""What one training step computes."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_nrs
from tests.support.arrays import ROUNDING
from tests.support.asserts import assert_equal
from tests.support.asserts import numpy_values
from tests.support.data import image_data
from tests.support.divergences import softmax
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.support.perturbations import FixedPerturbation
from tests.support.precision import precision


class Linear(layers.Dense):
    """Dense, in float64 too: on PyTorch `keras.ops.matmul` rounds to float32."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.sum(inputs[:, :, None] * self.kernel, axis=1) + self.bias


def linear_softmax(x: np.ndarray, seed: int = 0) -> keras.Model:
    """f(x) = x W + b with fixed weights, trained by SGD at learning rate 1."""
    rng = np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((x.shape[1],)), Linear(3)])
    dtype = keras.config.floatx()
    model.set_weights(
        [rng.normal(size=(x.shape[1], 3)).astype(dtype), rng.normal(size=3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss)
    return model


def closed_form(
    x: np.ndarray,
    y: np.ndarray,
    weights: list[np.ndarray],
    deltas: list[np.ndarray],
    *,
    alpha: float,
    beta: float,
) -> list[np.ndarray]:
    """The gradient of Equation 3 for the linear-softmax model, in float64."""
    kernel, bias = weights
    p = softmax(x @ kernel + bias)
    q = softmax(x @ (kernel + deltas[0]) + bias + deltas[1])
    one_hot = np.eye(3)[y]
    log_ratio = np.log(p) - np.log(q)
    kl = np.sum(p * log_ratio, axis=1, keepdims=True)
    d_logits = (p - one_hot) + alpha * p * (log_ratio - kl)
    d_perturbed_logits = beta * (q - one_hot) + alpha * (q - p)
    d_both = (d_logits + d_perturbed_logits) / len(x)
    return [x.T @ d_both, d_both.sum(axis=0)]


def one_step_gradient(x: np.ndarray, y: np.ndarray, **kwargs: Any) -> Any:
    model = linear_softmax(x)
    before = numpy_values(model.trainable_variables)
    options = {"perturbation": FixedPerturbation(), "normalize": False} | kwargs
    nrs = keras_nrs.wrap(model, **options)
    nrs.fit(x, y, batch_size=len(x), verbose=0)
    after = numpy_values(model.trainable_variables)
    return before, [b - a for a, b in zip(after, before, strict=True)]


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(16, 5)).astype(keras.config.floatx())
    return x, rng.integers(0, 3, 16)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(3.0, 0.5), *rest(pytest.param(1.0, 0.0), pytest.param(1.0, 1.0))],
)
def test_gradient_equals_closed_form(
    data: tuple[np.ndarray, np.ndarray], alpha: float, beta: float
) -> None:
    x, y = data
    before, gradient = one_step_gradient(x, y, eps=0.5, alpha=alpha, beta=beta)
    deltas = FixedPerturbation().sample(before, 0.5, None)
    deltas = [np.asarray(keras.ops.convert_to_numpy(d), "float64") for d in deltas]
    expected = closed_form(
        x.astype("float64"),
        y,
        [w.astype("float64") for w in before],
        deltas,
        alpha=alpha,
        beta=beta,
    )
    # The gradient is read off as a difference of weights below 4, and summed over 16
    # samples of about 10 operations each: 200 roundings of size 4 at the most.
    bound = 200 * 4 * ROUNDING
    for got, want in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def test_gradient_equals_closed_form_in_float64() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(16, 5)), rng.integers(0, 3, 16)
    with precision("float64"):
        before, gradient = one_step_gradient(x, y, eps=0.5, alpha=3.0, beta=0.5)
        deltas = FixedPerturbation().sample(before, 0.5, None)
        deltas = [keras.ops.convert_to_numpy(d) for d in deltas]
    expected = closed_form(x, y, before, deltas, alpha=3.0, beta=0.5)
    for got, want in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", [None, *rest(5)])
def test_both_passes_see_the_same_dropout_masks(seed: int | None) -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(dropout=0.5, seed=seed), eps=0.0)
    history = nrs.fit(x, y, epochs=3, verbose=0).history
    # A GPU may compute both passes by other kernels.
    assert history["model_divergence"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)


def test_dropout_masks_differ_between_steps() -> None:
    x, y = image_data()
    model = cnn(dropout=0.5, seed=5)
    nrs = keras_nrs.wrap(model, eps=0.0)
    model.optimizer.learning_rate = 0.0
    losses = [nrs.train_on_batch(x, y)[0] for _ in range(3)]
    assert len(set(map(float, losses))) == 3


def test_batch_norm_statistics_come_from_the_clean_pass() -> None:
    x, y = image_data()

    def moving_statistics(eps: float | None) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = cnn()
        model.optimizer.learning_rate = 0.0
        nrs = model
        if eps is not None:
            nrs = keras_nrs.wrap(model, eps=eps, perturbation="ball")
        nrs.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        bn = model.layers[1]
        return numpy_values([bn.moving_mean, bn.moving_variance])

    for got, want in zip(moving_statistics(1e6), moving_statistics(None), strict=True):
        # The same moments, maybe fused differently: a sum of 256 terms.
        np.testing.assert_allclose(got, want, rtol=256 * ROUNDING)


@pytest.mark.parametrize("scheme", ["nrs", *rest("rpr")])
def test_penalties_count_once(scheme: str) -> None:
    """With frozen weights, the loss grows by the penalty itself."""
    x, y = image_data()

    def loss(penalty: float) -> tuple[float, float, float]:
        keras.utils.set_random_seed(0)
        model = cnn(penalty=penalty)
        model.optimizer.learning_rate = 0.0
        norm = float(np.sum(np.square(model.layers[-2].get_weights()[0])))
        nrs = keras_nrs.wrap(model, eps=0.5, scheme=scheme, seed=1)
        logs = nrs.train_on_batch(x, y, return_dict=True)
        return float(logs["loss"]), float(logs["perturbed_loss"]), penalty * norm

    bare, bare_perturbed, _ = loss(0.0)
    total, perturbed, penalty = loss(0.1)
    assert penalty > 0.1
    # Differences of numbers below 8, each rounded a few times.
    bound = 10 * 8 * ROUNDING
    assert total - bare == pytest.approx(penalty, abs=bound)
    assert perturbed == pytest.approx(bare_perturbed, abs=bound)


def test_activity_penalties_are_part_of_both_losses() -> None:
    x, y = image_data()
    inputs = keras.Input((6, 6, 1))
    hidden = layers.Flatten()(inputs)
    hidden = layers.ActivityRegularization(l2=0.1)(hidden)
    model = keras.Model(inputs, layers.Dense(3)(hidden))
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.0))
    expected = float(model.test_on_batch(x, y)[0])
    assert expected > 0.1 * np.sum(np.square(x)) / len(x)
    logs = keras_nrs.wrap(model, eps=0.0).train_on_batch(x, y, return_dict=True)
    assert float(logs["perturbed_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(logs["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.matrix
def test_rpr_has_no_gradient_from_the_clean_loss(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    x, y = data
    before, gradient = one_step_gradient(x, y, eps=0.5, scheme="rpr")
    deltas = FixedPerturbation().sample(before, 0.5, None)
    deltas = [keras.ops.convert_to_numpy(d) for d in deltas]
    q = softmax(x @ (before[0] + deltas[0]) + before[1] + deltas[1])
    d_logits = (q - np.eye(3)[y]) / len(x)
    bound = 200 * 4 * ROUNDING
    np.testing.assert_allclose(gradient[0], x.T @ d_logits, rtol=0, atol=bound)


@pytest.mark.matrix
def test_normalize_leaves_the_balance_of_loss_and_penalty() -> None:
    """With a delta of 0 it is plain Keras."""
    x, y = image_data(32)
    weights = []
    for wrapped in (False, True):
        keras.utils.set_random_seed(0)
        model: Any = cnn(penalty=0.1, batch_norm=False)
        if wrapped:
            model = keras_nrs.wrap(model, eps=0.0, normalize=True)
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * ROUNDING)


@pytest.mark.matrix
def test_normalize_divides_the_total(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    _, plain = one_step_gradient(x, y, eps=0.5, beta=3.0)
    _, normalized = one_step_gradient(x, y, eps=0.5, beta=3.0, normalize=True)
    bound = 200 * 4 * ROUNDING
    for a, b in zip(plain, normalized, strict=True):
        np.testing.assert_allclose(a, 4 * b, rtol=0, atol=4 * bound)


def test_zero_sample_weight_removes_a_sample_from_all_terms() -> None:
    x, y = image_data(16)
    weight = np.where(np.arange(16) < 12, 1.0, 0.0)
    garbage = np.where(weight[:, None, None, None] == 1, x, 50.0).astype("float32")
    nrs = keras_nrs.wrap(cnn(batch_norm=False), eps=1.0, seed=0)
    nrs.optimizer.learning_rate = 0.0
    (seed,) = numpy_values([nrs.seed_generator.state])

    def logs(x: np.ndarray) -> dict[str, Any]:
        nrs.seed_generator.state.assign(seed)
        nrs.reset_metrics()
        return nrs.train_on_batch(x, y, sample_weight=weight, return_dict=True)

    first, second = logs(x), logs(garbage)
    for name in ("loss", "model_divergence", "perturbed_loss"):
        assert float(first[name]) == float(second[name])


@pytest.mark.matrix
def test_class_weight_weighs_the_divergence() -> None:
    """A weight of 2 on every class doubles all three terms."""
    x, y = image_data()

    def logs(**kwargs: Any) -> dict[str, Any]:
        keras.utils.set_random_seed(0)
        nrs = keras_nrs.wrap(cnn(), eps=1.0, seed=0)
        return nrs.train_on_batch(x, y, return_dict=True, **kwargs)

    plain, doubled = logs(), logs(class_weight={0: 2.0, 1: 2.0, 2: 2.0})
    for name in ("loss", "model_divergence", "perturbed_loss"):
        ratio = float(doubled[name]) / float(plain[name])
        assert ratio == pytest.approx(2.0, rel=1e-5)


@pytest.mark.matrix
def test_reported_terms_add_up_to_the_loss() -> None:
    x, y = image_data(60)
    nrs = keras_nrs.wrap(cnn(), eps=1.0, alpha=0.7, beta=0.3, seed=0)
    clean = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for _ in range(3):
        loss = clean(y, nrs.base_model(x, training=True))
        expected_clean = float(keras.ops.convert_to_numpy(loss))
        logs = nrs.train_on_batch(x, y, return_dict=True)
        nrs.reset_metrics()
        terms = 0.7 * float(logs["model_divergence"])
        terms += 0.3 * float(logs["perturbed_loss"])
        expected = (expected_clean + terms) / 1.3
        assert float(logs["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("interval", [3, 2])
def test_interval_perturbs_every_kth_step(interval: int) -> None:
    """On the other steps the loss is the plain one."""
    x, y = image_data()
    model = cnn(batch_norm=False)
    model.optimizer.learning_rate = 0.0
    nrs = keras_nrs.wrap(model, eps=0.0, interval=interval, normalize=False)
    losses = []
    for _ in range(7):
        losses.append(float(nrs.train_on_batch(x, y)[0]))
        nrs.reset_metrics()
    plain = float(nrs.evaluate(x, y, verbose=0)[0])
    expected = [2 * plain if i % interval == 0 else plain for i in range(7)]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.matrix
def test_only_chosen_trainable_weights_are_perturbed() -> None:
    """Seen through an output that depends on the kept weights only."""
    x, y = image_data()
    model = cnn()
    # A bias that BatchNorm takes away again, up to rounding.
    kept = keras_nrs.perturbations.Ball(
        where=lambda v: "conv" in v.path and v.name == "bias"
    )
    nrs = keras_nrs.wrap(model, eps=10.0, perturbation=kept)
    with pytest.warns(UserWarning, match="no effect"):
        history = nrs.fit(x, y, verbose=0).history
    assert abs(history["model_divergence"][0]) < 1e-6
    last = model.layers[-1]
    for layer in model.layers[:-1]:
        layer.trainable = False
    compile_classifier(model)
    nrs = keras_nrs.wrap(model, eps=10.0, perturbation="ball")
    frozen = numpy_values(model.layers[0].variables)
    assert nrs.fit(x, y, verbose=0).history["model_divergence"][0] > 0
    assert_equal(numpy_values(model.layers[0].variables), frozen)
    last.trainable = False
    model.layers[0].trainable = True
    compile_classifier(nrs)
    before = numpy_values(last.variables)
    nrs.fit(x, y, verbose=0)
    assert_equal(numpy_values(last.variables), before)
    assert not np.array_equal(frozen[0], numpy_values(model.layers[0].variables)[0])


def test_masked_positions_do_not_count() -> None:
    """Divergence and perturbed loss are means over positions that are no padding."""
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    labels = np.array([[0, 1, 2, 0], [1, 0, 0, 0]])
    model = keras.Sequential(
        [layers.Embedding(5, 3, mask_zero=True), layers.Dense(3, use_bias=False)]
    )
    compile_classifier(model, metrics=None)
    model.build((2, 4))
    table, kernel = model.get_weights()
    nrs = keras_nrs.wrap(model, eps=0.5, perturbation=FixedPerturbation())
    logs = nrs.train_on_batch(tokens, labels, return_dict=True)
    deltas = [
        keras.ops.convert_to_numpy(d)
        for d in FixedPerturbation().sample([table, kernel], 0.5, None)
    ]
    counted = tokens != 0
    p = softmax((table @ kernel)[tokens][counted])
    q = softmax(((table + deltas[0]) @ (kernel + deltas[1]))[tokens][counted])
    divergence = np.mean(np.sum(p * np.log(p / q), axis=1))
    loss = -np.mean(np.log(q[np.arange(4), labels[counted]]))
    # A handful of sums of ten terms in float32.
    assert float(logs["model_divergence"]) == pytest.approx(divergence, rel=1e-4)
    assert float(logs["perturbed_loss"]) == pytest.approx(loss, rel=1e-4)


# A share of the batch.


def frozen_cnn(**kwargs: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = cnn(**kwargs)
    model.optimizer.learning_rate = 0.0
    return model


@pytest.mark.parametrize("perturbations_per_replica", [3, *rest(1)])
@pytest.mark.parametrize("batch_norm", [True, *rest(False)])
def test_on_a_share_both_passes_see_the_same_masks_and_moments(
    batch_norm: bool, perturbations_per_replica: int
) -> None:
    x, y = image_data(32)
    nrs = keras_nrs.wrap(
        cnn(dropout=0.5, batch_norm=batch_norm, seed=5),
        eps=0.0,
        perturbed_fraction=0.4,
        perturbations_per_replica=perturbations_per_replica,
    )
    history = nrs.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    # Of equal outputs, which may be rounded differently. With other masks it is 0.2.
    assert history["model_divergence"] == pytest.approx([0, 0], abs=10 * ROUNDING)


@pytest.mark.parametrize(
    ("reduction", "stateful", "perturbations_per_replica"),
    [
        ("sum_over_batch_size", True, 2),
        *rest(pytest.param("sum", False, 1)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("sum_over_batch_size", True, 1),
                ("sum_over_batch_size", False, 1),
                ("sum_over_batch_size", False, 2),
                ("sum", True, 1),
                ("sum", True, 2),
                ("sum", False, 2),
            ]
        ),
    ],
)
def test_a_share_estimates_the_terms_without_bias(
    reduction: str, stateful: bool, perturbations_per_replica: int
) -> None:
    """Over many steps without learning, their means are those of the whole batch."""
    x, y = image_data(9)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=reduction
    )

    def history(steps: int, **kwargs: Any) -> dict[str, np.ndarray]:
        model = frozen_cnn(batch_norm=False)
        if stateful:  # Splits the clean pass, and changes nothing.
            model = keras.Sequential([model, layers.Dropout(1e-7, seed=1)])
        compile_classifier(model, loss=loss, optimizer=keras.optimizers.SGD(0.0))
        nrs = keras_nrs.wrap(model, 1.0, perturbation=FixedPerturbation(), **kwargs)
        logs = [nrs.train_on_batch(x, y, return_dict=True) for _ in range(steps)]
        names = ("loss", "model_divergence", "perturbed_loss")
        return {n: np.array([float(step[n]) for step in logs]) for n in names}

    kwargs = {"perturbations_per_replica": perturbations_per_replica}
    whole = history(1, **kwargs)
    shares = history(100, perturbed_fraction=0.45, seed=3, **kwargs)
    for name, values in shares.items():
        assert np.std(values) > 1e-3 * abs(np.mean(values))
        error = np.std(values) / np.sqrt(len(values))
        # Six means: a chance of 4e-4 for a false alarm, with a fixed seed.
        assert abs(np.mean(values) - whole[name][0]) < 4 * error, name


@pytest.mark.matrix
def test_a_share_leaves_the_clean_pass_and_metrics_alone() -> None:
    """Outputs are in the order of the labels again."""
    x, y = image_data(50)
    bare = frozen_cnn(batch_norm=False)
    expected = bare.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    model = frozen_cnn(batch_norm=False)
    nrs = keras_nrs.wrap(
        model, 0.3, beta=0.0, perturbation="relative", perturbed_fraction=0.3
    )
    history = nrs.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    assert history["accuracy"] == expected["accuracy"]
    total = expected["loss"][0] + history["model_divergence"][0]
    assert history["loss"] == pytest.approx([total], rel=1e-5)


@pytest.mark.matrix  # It runs eagerly, where JAX compiles each operation.
def test_the_perturbed_pass_sees_that_share_only() -> None:
    seen: list[int] = []

    class Recorder(layers.Layer):
        def call(self, inputs: Any) -> Any:
            seen.append(inputs.shape[0])
            return inputs

    model = keras.Sequential([keras.Input((1,)), Recorder(), layers.Dense(3)])
    compile_classifier(model, run_eagerly=True)
    seen.clear()
    nrs = keras_nrs.wrap(model, 0.1, perturbed_fraction=0.25, seed=0)
    nrs.train_on_batch(np.zeros((16, 1)), np.zeros(16))
    assert {4, 16} <= set(seen) <= {4, 16, None}


# Memory.


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "interval": 2,
            "perturbations_per_replica": 3,
            "perturbation": "filterwise",
        },
        *rest(
            {},
            {"perturbation": "elementwise", "perturbed_fraction": 0.5},
            {"scheme": "rpr", "clean_pass": True},
            {"perturbations_per_replica": 3},
            {"perturbed_fraction": 0.5},
            {"interval": 2},
        ),
    ],
)
@pytest.mark.parametrize("seed", [None, *rest(5)])
def test_memory_efficient_steps_are_the_same_steps(
    seed: int | None, arguments: dict[str, Any]
) -> None:
    """With dropout, BatchNorm and a penalty."""
    x, y = image_data(32)

    def run(memory_efficient: bool) -> tuple[list[np.ndarray], dict[str, Any]]:
        keras.utils.set_random_seed(0)
        model = cnn(dropout=0.5, penalty=1e-3, seed=seed)
        nrs = keras_nrs.wrap(
            model,
            eps=0.3,
            memory_efficient=memory_efficient,
            seed=1,
            **({"perturbation": "relative"} | arguments),
        )
        fitted = nrs.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return numpy_values(model.variables), fitted.history

    (values, history), (expected, expected_history) = run(True), run(False)
    # 4 steps of sums of 1,000 terms of order one, which double errors at the most.
    bound = 16 * 1000 * ROUNDING
    for value, want in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=bound, atol=bound)
    for name, logged in history.items():
        np.testing.assert_allclose(logged, expected_history[name], rtol=bound)
    assert history["model_divergence"][-1] > 1e-3


class Empty(layers.Layer):
    """Dense, and a weight without elements."""

    def build(self, shape: Any) -> None:
        self.empty = self.add_weight(shape=(0, 4), name="empty")
        self.dense = layers.Dense(3)
        self.dense.build(shape)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs) + keras.ops.sum(self.empty)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "perturbation",
    ["filterwise", "layerwise", "relative", "ball", "elementwise"],
)
@pytest.mark.parametrize("memory_efficient", [True, *rest(False)])
def test_a_weight_without_elements(memory_efficient: bool, perturbation: str) -> None:
    """The step is that of the other weights."""
    x, y = image_data(16)

    def terms(layer: layers.Layer) -> list[float]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layer])
        compile_classifier(model, metrics=None)
        nrs = keras_nrs.wrap(
            model,
            eps=0.3,
            perturbation=perturbation,
            memory_efficient=memory_efficient,
            seed=0,
        )
        kernel = next(v for v in model.trainable_variables if v.shape == (36, 3))
        kernel.assign(np.linspace(-1, 1, 108).reshape(36, 3))
        logs = nrs.train_on_batch(x, y, return_dict=True)
        return list(map(float, logs.values()))

    found = terms(Empty())
    assert np.isfinite(found).all()
    if perturbation not in ("layerwise", "filterwise"):  # They draw for each weight.
        # Sums of 100 terms, in an order that may differ.
        assert found == pytest.approx(terms(layers.Dense(3)), rel=100 * ROUNDING)


def test_memory_efficient_with_masks_and_several_outputs() -> None:
    """Masked positions still do not count, and an output without a loss is fine."""
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    labels = np.array([[0, 1, 2, 0], [1, 0, 0, 0]])

    def logs(memory_efficient: bool) -> dict[str, float]:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,), dtype="int32")
        hidden = layers.Embedding(5, 3, mask_zero=True)(inputs)
        outputs = {"a": layers.Dense(3, name="a")(hidden), "b": hidden}
        model = keras.Model(inputs, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", {"a": loss})
        nrs = keras_nrs.wrap(
            model,
            0.5,
            perturbation=FixedPerturbation(),
            memory_efficient=memory_efficient,
        )
        nrs.train_on_batch(tokens, {"a": labels})
        logs = nrs.train_on_batch(tokens, {"a": labels}, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    assert logs(True) == pytest.approx(logs(False), rel=1000 * ROUNDING)
