"""Which attributes of a wrapped model are its base model's."""

import copy
import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_nrs
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import Subclassed
from tests.support.networks import cnn
from tests.support.networks import compile_classifier
from tests.test_nrs_model import functional_with_two_outputs
from tests.test_preprocessing import vit_classifier

# The public attributes of Keras's models that are NRS's own, by the reason.
OWN = {
    "they train, and use what training uses": """
        fit train_on_batch train_step make_train_function train_function
        compile compute_loss compute_metrics metrics metrics_variables
        reset_metrics get_metrics_result
        compute_loss_and_updates jax_state_sync compiled_loss compiled_metrics
        distribute_strategy distribute_reduction_method
        """,
    "they give what the base model's give, with state that training needs": """
        evaluate predict test_on_batch predict_on_batch test_step predict_step
        make_test_function make_predict_function test_function predict_function
        stop_evaluating stop_predicting call build quantize summary
        call_signature_parameters compute_output_spec rematerialized_call
        quantized_build quantized_call forward
        """,
    "they see NRS's variables besides": """
        variables non_trainable_variables get_state_tree set_state_tree
        stateless_call stateless_compute_loss symbolic_call
        named_parameters torch_params
        """,
    "they save NRS with the model": """
        save save_weights load_weights save_own_variables load_own_variables
        save_assets load_assets get_config from_config to_json
        get_build_config build_from_config
        """,
    "they name or describe the wrapper as a layer": """
        name path autocast dtype_policy quantization_mode
        """,
}


def subclassed() -> keras.Model:
    model = Subclassed()
    model(image_data()[0])
    compile_classifier(model)
    return model


def functional() -> keras.Model:
    model = functional_with_two_outputs()
    model.compile("sgd", loss="mse")
    return model


MODELS = {
    "Sequential": cnn,
    "functional": functional,
    "subclassed": subclassed,
    "KerasHub task": vit_classifier,
}


def public_names(model: keras.Model) -> list[str]:
    """The names of a model that are Keras's or its own, not those of a framework."""
    of_framework = {
        name
        for kind in type(model).__mro__
        if kind.__module__.split(".")[0] in ("torch", "tensorflow")
        for name in dir(kind)
    }
    # `keras.Model` may override some of them.
    of_keras = {
        name
        for kind in type(model).__mro__
        if kind.__module__.split(".")[0] not in ("torch", "tensorflow", "builtins")
        for name in vars(kind)
    }
    names = set(dir(model)) - (of_framework - of_keras)
    return sorted(name for name in names if not name.startswith("_"))


def value_of(model: Any, name: str) -> Any:
    """An attribute, or the error that it raises, as a text."""
    try:
        return getattr(model, name)
    except Exception as error:  # Some of Keras's attributes raise until they are set.
        return f"{type(error).__name__}: {error}"


def is_same(first: Any, second: Any) -> bool:
    """Whether two attributes are one object, or as good as one."""
    if isinstance(first, list | tuple):
        pairs = zip(first, second, strict=True)
        return len(first) == len(second) and all(is_same(*pair) for pair in pairs)
    if isinstance(first, keras.InputSpec):
        return bool(first.get_config() == second.get_config())
    is_value = callable(first) or isinstance(first, str | int | dict)
    return first is second or (is_value and bool(first == second))


@pytest.mark.parametrize("kind", [next(iter(MODELS)), *rest(*list(MODELS)[1:])])
def test_each_public_attribute_is_the_base_models_or_a_named_one(kind: str) -> None:
    base = MODELS[kind]()
    nrs = keras_nrs.wrap(base)
    own = set(" ".join(OWN.values()).split())
    others = [name for name in public_names(base) if name not in own]
    differing = [n for n in others if not is_same(value_of(base, n), value_of(nrs, n))]
    assert differing == []
    missing = [name for name in own & set(public_names(base)) if name not in dir(nrs)]
    assert missing == []


def test_attributes_are_assigned_and_deleted_in_the_base_model() -> None:
    base = subclassed()
    base.temperature = 1.0
    nrs = keras_nrs.wrap(base)
    nrs.temperature = 2.0
    nrs.note = "new"
    assert (base.temperature, base.note) == (2.0, "new")
    assert nrs.note == "new"
    del nrs.note
    assert not hasattr(base, "note")
    nrs.trainable = False
    assert not base.trainable
    assert nrs.trainable_weights == base.trainable_weights == []
    # A layer's weights are the base model's, and perturbed.
    unbuilt = Subclassed()
    keras_nrs.wrap(unbuilt).head = keras.layers.Dense(5)
    assert unbuilt.head.units == 5
    assert unbuilt.head in unbuilt.layers


def test_options_cannot_be_assigned_and_coefficients_stay_nrss() -> None:
    nrs = keras_nrs.wrap(cnn())
    nrs.eps = 0.3
    assert float(nrs.eps) == pytest.approx(0.3)
    assert not hasattr(nrs.base_model, "eps")
    with pytest.raises(AttributeError, match="is set by wrap"):
        nrs.interval = 2
    nrs._private = 1
    assert not hasattr(nrs.base_model, "_private")


def test_errors_name_both_models() -> None:
    nrs = keras_nrs.wrap(cnn())
    with pytest.raises(
        AttributeError, match="'NRSModel' object has no attribute 'foo'"
    ):
        nrs.foo  # noqa: B018
    with pytest.raises(AttributeError, match="of class Sequential has none either"):
        nrs.foo()
    # A property of the base model says itself what is wrong.
    never_called = Subclassed()
    errors = [
        value_of(model, "input")
        for model in (never_called, keras_nrs.wrap(never_called))
    ]
    assert errors[0] == errors[1]


def test_no_name_is_added_that_the_saver_would_walk_over() -> None:
    base = Subclassed()
    base.aaa_layer = keras.layers.Dense(2)
    assert "aaa_layer" not in dir(keras_nrs.wrap(base))


@pytest.mark.matrix
def test_copies_and_pickles() -> None:
    x, y = image_data()
    nrs = keras_nrs.wrap(cnn(batch_norm=False), seed=1)
    nrs.fit(x, y, verbose=0)
    for copied in (copy.deepcopy(nrs), pickle.loads(pickle.dumps(nrs))):
        assert isinstance(copied, keras_nrs.NRSModel)
        assert copied.base_model is not nrs.base_model
        np.testing.assert_array_equal(
            copied.predict(x, verbose=0), nrs.predict(x, verbose=0)
        )
    clone = keras.models.clone_model(nrs)
    assert clone.given_coefficients() == nrs.given_coefficients()
    assert clone.count_params() == nrs.count_params()


@pytest.mark.matrix
def test_train_on_batch_returns_what_the_metrics_names_say() -> None:
    x, y = image_data()
    base = cnn()
    expected = base.train_on_batch(x, y)
    nrs = keras_nrs.wrap(cnn())
    values = nrs.train_on_batch(x, y)
    assert len(values) == len(expected) == len(nrs.metrics_names)
    assert nrs.metrics_names == base.metrics_names
    logs = nrs.train_on_batch(x, y, return_dict=True)
    assert set(logs) == {"loss", "accuracy", "model_divergence", "perturbed_loss"}


def test_summary_shows_the_settings() -> None:
    def lines(model: Any) -> list[str]:
        found: list[str] = []
        model.summary(print_fn=lambda line, **_: found.append(str(line)))
        return "\n".join(found).split("\n")

    base = cnn()
    nrs = keras_nrs.wrap(base, eps=0.3, interval=2)
    assert lines(nrs)[:-1] == lines(base)
    expected = (
        "scheme='nrs', perturbation=RelativeBall(), interval=2, eps=0.3, alpha=1.0"
    )
    assert lines(nrs)[-1] == f" Trained with keras_nrs: {expected}"
    for scheme, settings in {
        "baseline": "scheme='baseline'",
        "sam": "scheme='sam', perturbation=Ascent(), eps=0.05",
    }.items():
        assert lines(keras_nrs.wrap(base, scheme=scheme))[-1].endswith(f": {settings}")


@pytest.mark.parametrize("name", ["evaluate", "predict", "test_on_batch"])
def test_a_method_that_the_base_models_class_has_is_used(name: str) -> None:
    class Own(Subclassed):
        pass

    setattr(Own, name, lambda self, *args, **kwargs: f"own {name}")
    model = Own()
    compile_classifier(model)
    x, _ = image_data()
    nrs = keras_nrs.wrap(model)
    assert getattr(nrs, name)(x) == f"own {name}"


@pytest.mark.matrix
@pytest.mark.parametrize("ending", ["weights.h5", "weights.json", "keras"])
def test_weights_of_a_model_that_was_not_wrapped_load(
    tmp_path: Path, ending: str
) -> None:
    x, _ = image_data()

    def save(model: Any, path: Path) -> None:
        if ending == "keras":
            model.save(path)
        else:
            size = {"max_shard_size": 1.0} if ending.endswith("json") else {}
            model.save_weights(path, **size)

    path, own = tmp_path / f"plain.{ending}", tmp_path / f"nrs.{ending}"
    base = cnn()
    save(base, path)
    nrs = keras_nrs.wrap(cnn())
    nrs.load_weights(path)
    np.testing.assert_array_equal(nrs.predict(x, verbose=0), base.predict(x, verbose=0))
    save(nrs, own)
    nrs.load_weights(own, skip_mismatch=True)


def test_the_error_for_an_own_step_shows_what_to_write() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def train_step(self, data: Any) -> Any:
            return {}

    assigned = cnn()
    assigned.train_step = lambda *data: {}
    for model in (Own(), assigned):
        with pytest.raises(ValueError, match=r"nrs_objective\(y, y_pred"):
            keras_nrs.wrap(model)
