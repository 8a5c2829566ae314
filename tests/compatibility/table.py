"""The table of what works with what: its rows, and how it is found and written."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

import keras

from tests.compatibility import architectures
from tests.compatibility import data
from tests.compatibility import devices
from tests.compatibility import tools
from tests.compatibility import training
from tests.compatibility import weights
from tests.compatibility.way import Way
from tests.compatibility.way import short

Check = Callable[[Way], str | None]

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
ROWS: dict[str, dict[str, Check]] = {
    "Models": {
        "`Sequential`": architectures.sequential,
        "Functional, several inputs and outputs": architectures.functional,
        "Subclassed": architectures.subclassed,
        "Models within models, shared": architectures.models_in_models,
        "`keras.applications` (MobileNet)": architectures.keras_applications,
        "KerasHub `ViTImageClassifier`": architectures.keras_hub_vit,
        "KerasHub `ResNetImageClassifier`": architectures.keras_hub_resnet,
        "KerasHub `BertTextClassifier`, on strings": (
            architectures.keras_hub_text_classifier
        ),
        "KerasCV `ImageClassifier` (ViTDet)": architectures.keras_cv_image_classifier,
        "KerasCV's legacy `ViTTiny16`": architectures.keras_cv_legacy_vit,
        "Overriding `train_step()`": architectures.own_train_step,
    },
    "Weights": {
        "LoRA": weights.lora,
        '`quantize("int8")` after training': weights.int8_inference,
        "LoRA on int8 weights": weights.lora_on_int8,
        "`mixed_bfloat16`": weights.mixed_bfloat16,
        "`mixed_float16`, with its loss scaling": weights.mixed_float16,
    },
    "Training": {
        "Gradient accumulation": training.gradient_accumulation,
        "EMA (`use_ema`, `SwapEMAWeights`)": training.ema,
        "`steps_per_execution`": training.steps_per_execution,
        "`run_eagerly`": training.run_eagerly,
        "`jit_compile=True`": training.jit_compile,
        "`class_weight`": training.class_weight,
        "`sample_weight`": training.sample_weight,
        "`train_on_batch()`": training.on_batches,
    },
    "Data": {
        "Arrays": data.arrays,
        "`tf.data`": data.tf_data,
        "`PyDataset`": data.py_dataset,
        "`DataLoader`": data.data_loader,
        "Generators": data.generator,
    },
    "Several devices": {
        "`keras.distribution.DataParallel`": devices.data_parallel,
        "`keras.distribution.ModelParallel`": devices.model_parallel,
        "`tf.distribute.MirroredStrategy`": devices.mirrored_strategy,
    },
    "Tools": {
        "`save()`, `load_model()` in safe mode": tools.save,
        "`save_weights()`, `load_weights()`": tools.save_weights,
        "`export()`, SavedModel": tools.export_saved_model,
        '`export(format="torch")`': tools.export_torch,
        "`clone_model()`": tools.clone,
        "`EarlyStopping`": tools.early_stopping,
        "`BackupAndRestore`": tools.backup_and_restore,
        "`ReduceLROnPlateau`": tools.reduce_lr_on_plateau,
        "KerasTuner": tools.keras_tuner,
        "`keras_nrs.flatness`": tools.flatness,
    },
}
CHECKS = {name: check for rows in ROWS.values() for name, check in rows.items()}


class Found(NamedTuple):
    """What came of a check on one backend.

    Attributes:
        works: Whether it passed.
        reason: Why not, or what to mind.
    """

    works: bool
    reason: str = ""


def examine(check: Check) -> Found:
    """Run a check, and if it fails the same without NRS."""
    found = _run(check, Way())
    if found.works and not found.reason:
        return found
    plain = _run(check, Way(wrapped=False))
    if plain == found:
        return Found(found.works, f"without keras_nrs too: {plain.reason}")
    if plain.reason:
        reason = f"{found.reason}; without keras_nrs: {plain.reason}"
        return Found(found.works, reason)
    return found


def _run(check: Check, way: Way) -> Found:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    try:
        return Found(True, check(way) or "")
    except Exception as error:
        return Found(False, short(error))


def markdown(found: Mapping[str, Mapping[str, Found]], versions: str) -> str:
    """The page, from what was found for each backend and row."""
    reasons: list[str] = []
    lines = []
    for group, rows in ROWS.items():
        lines += [f"| **{group}** |{' |' * len(BACKENDS)}"]
        lines += [
            f"| {row} | "
            + " | ".join(_cell(found[backend][row], reasons) for backend in BACKENDS)
            + " |"
            for row in rows
        ]
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, start=1)]
    header = [
        f"| | {' | '.join(BACKENDS.values())} |",
        f"|---|{'---|' * len(BACKENDS)}",
    ]
    return "\n".join([*_INTRODUCTION, versions, "", *header, *lines, "", *notes, ""])


def _cell(found: Found, reasons: list[str]) -> str:
    word = "yes" if found.works else "no"
    if not found.reason:
        return word
    if found.reason not in reasons:
        reasons.append(found.reason)
    return f"{word} ({reasons.index(found.reason) + 1})"


_INTRODUCTION: Sequence[str] = (
    "# What works with what",
    "",
    "Written by `python -m tests.compatibility`, which tries each row on tiny models:",
    "training, predicting, and what the row is about. Where that fails, it tries the",
    "same without keras_nrs.",
    "",
)
