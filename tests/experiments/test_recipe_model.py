"""The models of recipes: their optimizers, penalties and precision."""

import keras
import pytest

import keras_nrs
from keras_nrs.data import ImageData
from keras_nrs.experiments.recipe_model import build_model
from keras_nrs.experiments.recipes import Recipe
from tests.experiments.runs import digits_recipe

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def built(recipe: Recipe, data_dir: str) -> keras_nrs.NRSModel:
    data = ImageData(**recipe.data_settings(), data_dir=data_dir)
    return build_model(recipe, data, seed=0)


def test_float16_has_a_loss_scale_with_both_optimizers(data_dir: str) -> None:
    for optimizer in ("sgd", "adam"):
        recipe = digits_recipe(optimizer=optimizer, dtype_policy="mixed_float16")
        model = built(recipe, data_dir)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert keras.config.dtype_policy().name == "float32"


def test_sgd_has_coupled_decay_and_a_cosine_to_zero(data_dir: str) -> None:
    model = built(digits_recipe(weight_decay=0.01, epochs=3), data_dir)
    optimizer = model.optimizer
    assert optimizer.weight_decay is None
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert optimizer.global_clipnorm == 5.0
    assert len(model.base_model.losses) == len(
        [v for v in model.trainable_variables if v.name == "kernel"]
    )
    schedule = optimizer._learning_rate
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(6)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("network", ["wide_resnet_10_1", "vgg16"])
def test_all_weights_decay_as_released(data_dir: str, network: str) -> None:
    recipe = digits_recipe(network=network, source="released", clip_norm=2.0)
    model = built(recipe, data_dir)
    assert model.optimizer.global_clipnorm == 2.0
    assert len(model.base_model.losses) == len(model.trainable_variables)
    has_batch_norm = "gamma" in {v.name for v in model.trainable_variables}
    assert has_batch_norm == (network != "vgg16")
    recipe = digits_recipe(network=network, optimizer="adam", source="released")
    optimizer = built(recipe, data_dir).optimizer
    assert all(map(optimizer._use_weight_decay, model.trainable_variables))
    assert optimizer.epsilon == 1e-8


@pytest.mark.parametrize(("source", "rates"), [("paper", set()), ("released", {0.1})])
def test_vits_have_dropout_as_released(
    data_dir: str, source: str, rates: set[float]
) -> None:
    recipe = digits_recipe(network="vit_ti", optimizer="adam", source=source)
    layers = built(recipe, data_dir).base_model.layers
    dropout = [x for x in layers if isinstance(x, keras.layers.Dropout)]
    assert {layer.rate for layer in dropout} == rates
    # After the positions, and three in each of 12 blocks.
    assert len(dropout) == (1 + 3 * 12 if rates else 0)
    attention = [x for x in layers if isinstance(x, keras.layers.MultiHeadAttention)]
    assert {layer.dropout for layer in attention} == (rates or {0})


def test_the_papers_vgg16_has_batch_norm(data_dir: str) -> None:
    model = built(digits_recipe(network="vgg16"), data_dir)
    assert "gamma" in {v.name for v in model.trainable_variables}


@pytest.mark.parametrize("network", ["wide_resnet_10_1", "vit_ti"])
def test_adam_decays_kernels_alone_as_in_the_paper(data_dir: str, network: str) -> None:
    recipe = digits_recipe(
        network=network,
        optimizer="adam",
        learning_rate=0.1,
        weight_decay=0.5,
        epochs=4,
        warmup_epochs=1,
    )
    model = built(recipe, data_dir)
    assert not model.base_model.losses
    optimizer = model.optimizer
    decayed = [optimizer._use_weight_decay(v) for v in model.trainable_variables]
    assert decayed == [v.name == "kernel" for v in model.trainable_variables]
    assert float(optimizer._learning_rate(0)) == 0
    assert float(optimizer._learning_rate(2)) == pytest.approx(0.1)
