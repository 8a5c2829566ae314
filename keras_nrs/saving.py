"""The files of wrapped models: their contents, and writing them."""

import inspect
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import h5py
import keras

from keras_nrs._files import atomic_write

# Arguments of an `NRSModel` that Keras may serialize as objects.
_OBJECTS = ("base_model", "eps", "alpha", "perturbation", "divergence")
# The weights in a `.keras` file.
_WEIGHTS = "model.weights.h5"


class SavedModel(Protocol):
    """The attributes of an `NRSModel` that its file is made of."""

    name: str
    eps: keras.Variable
    alpha: keras.Variable
    weights: list[keras.Variable]
    variables: list[keras.Variable]


def check_format(filepath: Any) -> None:
    """Raise an error for Keras's legacy HDF5 format."""
    if str(filepath).endswith((".h5", ".hdf5")):
        raise ValueError(
            "`filepath` must end in '.keras'. Received: "
            f"filepath={os.fspath(filepath)!r}, a legacy format that cannot hold a "
            "wrapped model. keras_nrs.unwrap(model).save(...) writes yours in it."
        )


def write_by_first_process(
    save: Callable[..., Any],
    ending: str,
    filepath: Any,
    overwrite: bool,
    process_index: int,
    **options: Any,
) -> None:
    """Write a file atomically, in the first of several processes alone.

    Args:
        save: Keras's function `save(filepath, overwrite=..., **options)`.
        ending: The ending of files that are written atomically.
        filepath: The path that the user gave.
        overwrite: Whether to replace a file without asking.
        process_index: The index of this process.
        **options: Other arguments of `save`.
    """
    path = pathlib.Path(filepath)
    if process_index > 0:
        # Reading the variables may take all processes: the others read them too.
        with tempfile.TemporaryDirectory() as unused:
            save(pathlib.Path(unused) / path.name, overwrite=True, **options)
        return
    is_one_local_file = "://" not in str(filepath) and path.name.endswith(ending)
    if not is_one_local_file or (path.exists() and not overwrite):
        save(filepath, overwrite=overwrite, **options)
        return
    with atomic_write(path) as unfinished:
        save(unfinished, overwrite=True, **options)


def holds_wrapped_model(filepath: Any) -> bool:
    """Whether a file of weights is that of an `NRSModel`, or of a kind unknown here."""
    path = pathlib.Path(str(filepath))
    if not path.is_file():
        return True
    if path.name.endswith(".weights.h5"):
        return _is_wrapped_models(path)
    if path.name.endswith(".weights.json"):
        shards = json.loads(path.read_bytes()).get("weight_map", {})
        return any(name.strip("/").startswith("base_model") for name in shards)
    if path.name.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            if _WEIGHTS in archive.namelist():
                with archive.open(_WEIGHTS) as weights:
                    return _is_wrapped_models(weights)
    return True


def _is_wrapped_models(weights: Any) -> bool:
    with h5py.File(weights, "r") as file:
        return "base_model" in file


def saved_state(model: SavedModel) -> list[keras.Variable]:
    """The variables that are needed to continue a run, but are no weights.

    Keras does not save the states of random generators. These are here, with the base
    model's, so that a reloaded model draws the same dropout masks and perturbations as
    one that was never saved. A file holds them by position.
    """
    weights = set(map(id, model.weights))
    seeds = [v for v in model.variables if id(v) not in weights]
    return [model.eps, model.alpha, *seeds]


def save_state(model: SavedModel, store: Any) -> None:
    """Write `saved_state()` into the store of a file."""
    for i, variable in enumerate(saved_state(model)):
        store[f"{i}"] = variable


def load_state(model: SavedModel, store: Any) -> None:
    """Assign what `save_state()` wrote.

    Raises:
        ValueError: if the file is of another architecture.
    """
    state = saved_state(model)
    if len(store.keys()) != len(state):
        raise ValueError(
            f"The file holds {len(store.keys())} values of eps, alpha and random "
            f"states, and the model '{model.name}' has {len(state)}. Load weights "
            "into an NRSModel around the architecture that they were saved from; "
            "weights of a model that was not wrapped load into "
            "keras_nrs.unwrap(model)."
        )
    for i, variable in enumerate(state):
        variable.assign(store[f"{i}"])


def arguments_from_config(
    config: Mapping[str, Any], signature: inspect.Signature, custom_objects: Any
) -> dict[str, Any]:
    """The arguments of an `NRSModel` from the config in a file.

    Raises:
        ValueError: if the config does not fit the signature.
    """
    try:
        signature.bind(**config)
    except TypeError as error:
        raise ValueError(
            "`config` must be what get_config() of this version of keras_nrs or of an "
            f"older one gave. Received: a config with which {error}. Load a file of a "
            "newer version with that version; keras_nrs.unwrap(model).save(...) makes "
            "one that needs none."
        ) from error
    members = {
        name: keras.saving.deserialize_keras_object(
            config[name], custom_objects=custom_objects
        )
        for name in _OBJECTS
        if name in config
    }
    # Before 0.2, RPR always had the pass at theta.
    is_old_rpr = config.get("scheme") == "rpr" and "clean_pass" not in config
    return {**config, **({"clean_pass": True} if is_old_rpr else {}), **members}
