"""The model that a recipe trains."""

import keras

import keras_nrs
from keras_nrs.data import ImageData
from keras_nrs.experiments.recipes import NETWORKS
from keras_nrs.experiments.recipes import RELEASED_NETWORKS
from keras_nrs.experiments.recipes import Recipe
from keras_nrs.models import with_l2


def build_model(recipe: Recipe, data: ImageData, seed: int) -> keras_nrs.NRSModel:
    """The compiled and wrapped network of a recipe.

    Args:
        recipe: Names the network, and says how it is trained.
        data: The recipe's data, which give the image shape and the number of steps.
        seed: Seed of initial weights, dropout and perturbations.

    Raises:
        TypeError, ValueError: if the network cannot have images of this shape.
    """
    keras.utils.set_random_seed(seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.dtype_policy)
    try:
        is_released = recipe.source == "released"
        networks = NETWORKS | (RELEASED_NETWORKS if is_released else {})
        network = networks[recipe.network](data.image_shape, data.num_classes)
        if recipe.optimizer == "sgd" and recipe.weight_decay:
            network = with_l2(network, recipe.weight_decay, all_weights=is_released)
    finally:
        keras.config.set_dtype_policy(policy)
    metrics: list[keras.metrics.Metric] = [
        keras.metrics.CategoricalAccuracy("accuracy"),
        # The compiled loss also has the penalties on weights.
        keras.metrics.CategoricalCrossentropy("cross_entropy", from_logits=True),
    ]
    if data.num_classes > 100:  # ImageNet, as in Table 2.
        metrics.append(keras.metrics.TopKCategoricalAccuracy(5, "top_5_accuracy"))
    steps_per_epoch = recipe.steps_per_epoch or data.steps_per_epoch
    network.compile(
        optimizer=_optimizer(recipe, network, steps_per_epoch),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=metrics,
    )
    return keras_nrs.wrap(
        network,
        recipe.eps,
        recipe.alpha,
        seed=seed,
        **recipe.step_arguments(),
    )


def _optimizer(recipe: Recipe, network: keras.Model, steps: int) -> keras.Optimizer:
    warmup = recipe.warmup_epochs * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else recipe.learning_rate,
        max(1, recipe.epochs * steps - warmup),
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    if recipe.optimizer == "sgd":
        # The network has the weight decay, as a penalty in its loss.
        return keras.optimizers.SGD(
            schedule, momentum=0.9, nesterov=True, global_clipnorm=recipe.clip_norm
        )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=recipe.weight_decay,
        epsilon=1e-8 if recipe.source == "released" else 1e-7,
        global_clipnorm=recipe.clip_norm,
    )
    if recipe.source == "paper":
        # As with the penalty, biases, scales and embeddings do not decay.
        optimizer.exclude_from_weight_decay(
            [v for v in network.trainable_variables if v.name != "kernel"]
        )
    return optimizer
