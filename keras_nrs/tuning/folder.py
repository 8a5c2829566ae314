"""The folder of a call of `tune()`: finished trainings and weights worth keeping."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_nrs import keras_internals
from keras_nrs._files import DamagedFileError
from keras_nrs._files import atomic_write
from keras_nrs._files import expect_object
from keras_nrs._files import write_text
from keras_nrs._run_store import RunStore
from keras_nrs.tuning.measures import Metric
from keras_nrs.tuning.settings import Setting
from keras_nrs.tuning.settings import plain_members
from keras_nrs.tuning.settings import serialized
from keras_nrs.versions import version_of

Row = dict[str, Any]

_KEY = ("arguments", "epochs", "seed")
# Names count objects, and layers are described one by one.
_LEFT_OUT = ("name", "layers", "input_layers", "output_layers", "shared_object_id")


class Folder:
    """Finished trainings in `runs.json`, and the weights of each setting's best one.

    Args:
        path: Path of the folder.
        request: What all trainings share, as `request_of()` describes it.

    Raises:
        DamagedFileError: if the file of trainings cannot be right.
        ValueError: if the folder is one of another call.
    """

    def __init__(self, path: Path, request: Row) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"`folder` must be a folder. Received: folder={str(path)!r}, which is "
                "a file. Choose another name."
            )
        self._path = path
        self._store = RunStore(
            path / "runs.json", _KEY, request, check_row=_check_row, renames=False
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which this call alone writes to the folder.

        Raises:
            InUseError: if another process does.
        """
        with self._store.locked():
            yield

    def has(self, setting: Setting, seed: int, epochs: int) -> bool:
        """Whether a training is finished."""
        wanted = _wanted(setting, epochs)
        rows = self._store.rows
        return any(_is_of(row, wanted) and row["seed"] == seed for row in rows)

    def get(
        self,
        setting: Setting,
        seed: int,
        epochs: int,
        train: Callable[[], tuple[Row, keras.Model]],
        kept_for: Metric | None,
    ) -> Row:
        """The training of a setting with a seed, done now if it is not finished.

        Args:
            setting: The setting.
            seed: The seed.
            epochs: Its number of epochs.
            train: Does it, and returns the measurements and the model.
            kept_for: The metric by which weights are kept, the best of a setting's;
                `None` to keep none.
        """
        wanted = _wanted(setting, epochs) | {"seed": seed}
        of_setting = [row for row in self._store.rows if _is_of(row, wanted)]

        def run() -> Row:
            row, model = train()
            row["has_weights"] = kept_for is not None
            if kept_for is not None and not row["failed"]:
                earlier = [r for r in of_setting if r["has_weights"]]
                best = max((_score(r, kept_for) for r in earlier), default=-math.inf)
                if _score(row, kept_for) > best:
                    self._save_weights(model, wanted)
            return row

        return self._store.get(wanted, run)

    def load_weights(self, model: keras.Model, setting: Setting, epochs: int) -> None:
        """Give a model the weights that were kept, if a training has not failed.

        Raises:
            DamagedFileError: if their file is gone.
        """
        wanted = _wanted(setting, epochs)
        kept = [row for row in self._store.rows if _is_of(row, wanted)]
        if not any(row["has_weights"] and not row["failed"] for row in kept):
            return
        path = self._kept_path(wanted)
        if not path.exists():
            remedy = "Restore it, or delete the folder to train again."
            raise DamagedFileError(path, "it is missing", remedy)
        model.load_weights(path)

    def write_result(self, model: keras.Model, content: Row) -> None:
        """Write `result.json`, and `best.keras` if the model can be saved."""
        # JSON has no NaN: null in its place.
        text = json.dumps(content, default=repr)
        finite = json.loads(text, parse_constant=lambda name: None)
        write_text(self._path / "result.json", json.dumps(finite, indent=1) + "\n")
        path = self._path / "best.keras"
        try:
            with atomic_write(path) as unfinished:
                model.save(unfinished)
        except OSError:
            raise
        except Exception as error:  # Of a layer or loss of the user's own.
            # It may be the model of an earlier decision.
            path.unlink(missing_ok=True)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                "best.keras was not written, because the model cannot be saved: "
                f"{text[:400]} The folder has its weights, in best-....weights.h5. "
                "Give your own layers and losses a get_config().",
                stacklevel=5,
            )

    def _save_weights(self, model: keras.Model, wanted: Row) -> None:
        with atomic_write(self._kept_path(wanted)) as unfinished:
            model.save_weights(unfinished)

    def _kept_path(self, wanted: Row) -> Path:
        digest = _digest([wanted["arguments"], wanted["epochs"]])
        return self._path / f"best-{digest}.weights.h5"


def request_of(model: keras.Model, data: Row, validation: Row, fit: Row) -> Row:
    """What all trainings of a call share, as JSON that another call is compared with.

    Of arrays and models it has checksums, of data sets and functions their types alone.
    """
    if fit.get("class_weight"):
        # Keys may be NumPy's integers, which JSON does not take.
        weights = {str(key): weight for key, weight in fit["class_weight"].items()}
        fit = fit | {"class_weight": weights}
    return {
        "backend": keras.config.backend(),
        "Keras": keras.__version__,
        "keras_nrs": version_of("keras-nrs"),
        "model": _digest(_described(model)),
        "data": _digest(keras.tree.map_structure(_content, data)),
        "validation data": _digest(keras.tree.map_structure(_content, validation)),
        "fit": json.loads(json.dumps(fit, default=_content, sort_keys=True)),
    }


def _described(model: keras.Model) -> list[Any]:
    """Layers, weights, loss and optimizer of a built model."""
    layers = [model, *keras_internals.sublayers(model, recursive=True)]
    return [
        [_config(layer) for layer in layers],
        [[list(v.shape), str(v.dtype), bool(v.trainable)] for v in model.weights],
        _config(model.optimizer),
        _config(model.loss),
    ]


def _config(part: Any) -> Any:
    """The arguments of a layer, optimizer or loss, without names."""
    try:
        return _without_names(serialized(part))
    except Exception:  # It may be the user's own, whose code may raise anything.
        return type(part).__name__


def _without_names(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _without_names(v) for k, v in config.items() if k not in _LEFT_OUT}
    if isinstance(config, list | tuple):
        return [_without_names(member) for member in config]
    return config


def _content(value: Any) -> Any:
    """A value as JSON: arrays as checksums, callbacks by their numbers and texts."""
    if isinstance(value, str | int | float | None):
        return value
    if hasattr(value, "shape"):
        # A table of pandas has a dtype for each column.
        is_table = not hasattr(value, "dtype")
        array = np.asarray(value) if is_table else keras.ops.convert_to_numpy(value)
        array = np.ascontiguousarray(array)
        data = array.astype(str) if array.dtype == object else array
        return hashlib.sha256(data.tobytes()).hexdigest() + str(array.shape)
    if isinstance(value, keras.callbacks.Callback):
        return {type(value).__name__: plain_members(value)}
    return type(value).__name__


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _wanted(setting: Setting, epochs: int) -> Row:
    return {"arguments": setting.identity, "epochs": epochs}


def _is_of(row: Row, wanted: Row) -> bool:
    return all(row[name] == wanted[name] for name in ("arguments", "epochs"))


def _score(row: Row, metric: Metric) -> float:
    return -math.inf if row["failed"] else metric.sign * row["measured"][metric.name]


def _check_row(row: Any) -> None:
    kinds = {"arguments": str, "epochs": int, "seed": int, "has_weights": bool}
    measured = {"measured": dict, "history": dict, "failed": bool}
    expect_object(row, **kinds, **measured, seconds=(int, float), epochs_trained=int)
