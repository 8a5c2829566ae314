"""A table, figures and a page of the flatness of models: `keras-nrs flatness`."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from keras_nrs._files import expect_object
from keras_nrs._files import read_json
from keras_nrs._files import write_text
from keras_nrs._locks import locked
from keras_nrs.flatness.density import SpectralDensity
from keras_nrs.flatness.density import hessian_density
from keras_nrs.flatness.divergence import model_divergence
from keras_nrs.flatness.eigenvalues import hessian_eigenvalues
from keras_nrs.flatness.landscape import Landscape
from keras_nrs.flatness.landscape import loss_landscape
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.measurements import Measurements
from keras_nrs.flatness.measurements import Settings
from keras_nrs.flatness.plots import draw_densities
from keras_nrs.flatness.plots import draw_landscapes
from keras_nrs.flatness.report_page import results_page
from keras_nrs.flatness.report_page import results_table
from keras_nrs.flatness.sharpness import sharpness
from keras_nrs.flatness.trace import hessian_trace
from keras_nrs.stateless import as_float

Array = NDArray[Any]

# Results of another format, in a folder of an earlier version, are measured again.
_FORMAT = 4
# A loss is that of chance if right labels lower it by less than this share.
_CHANCE = 0.1


def load_data(name: str, model: keras.Model) -> tuple[Array, Array]:
    """Inputs and labels: `"digits"` of scikit-learn, or `x` and `y` of an `.npz` file.

    Raises:
        ValueError: if there is no such file, or the arrays are missing in it.
    """
    if name == "digits":
        from keras_nrs._digits import load_digits

        images, labels = load_digits()
        shape = getattr(base_model(model), "input_shape", None)
        if shape is None:
            raise ValueError(
                "`data` must be an .npz file if a model does not know the shape of its "
                f"input. Received: data='digits' and a {type(model).__name__}."
            )
        return images.reshape(-1, *shape[1:]), labels
    try:
        with np.load(name) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            "`data` must be 'digits' or an .npz file with the arrays x and y, as "
            f"numpy.savez(file, x=x, y=y) writes them. Received: data={name!r}. {error}"
        ) from error


def load_models(paths: Sequence[Path]) -> dict[str, keras.Model]:
    """Saved models by the names of their files, or by whole paths if names repeat.

    Raises:
        ValueError: if a file does not hold a compiled model.
    """
    names = [path.stem for path in paths]
    if len(set(names)) != len(names):
        names = [str(path) for path in paths]
    models = {}
    for name, path in zip(names, paths, strict=True):
        try:
            models[name] = keras.models.load_model(path)
            base_model(models[name])
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                "`models` must be files that save() of a compiled model wrote. "
                f"Received: {os.fspath(path)!r}. {error}"
            ) from error
    return models


class Report:
    """Measurements of models on the same data, in a folder.

    Measurements that an earlier call left in the folder, finished or stopped, are used
    again if model, data and settings are the same.

    Args:
        models: A dict from the names that table and figures show to the models.
        x: Inputs, an array.
        y: Labels, an array.
        settings: The settings of all measurements.
        output: The folder.
    """

    def __init__(
        self,
        models: dict[str, keras.Model],
        x: Array,
        y: Array,
        *,
        settings: Settings,
        output: Path,
    ) -> None:
        self.models = models
        self.settings = settings
        self.output = output
        self._x, self._y = x, y
        self.measurements: dict[str, Measurements] = {}
        self.landscapes: dict[str, Landscape] = {}
        self.densities: dict[str, SpectralDensity] = {}

    def run(self, console: Console) -> None:
        """Measure all models, showing progress, and draw the figures.

        Raises:
            DamagedFileError: if a file of results in the folder cannot be right.
            InUseError: if another process writes to the folder.
        """
        with locked(self.output):
            self._run(console)

    def _run(self, console: Console) -> None:
        for name, model in self.models.items():
            console.print(f"{name}: {self.settings.variables}")
            self._measure_model(name, model)
            self._warn_of_chance(name, console)
        draw_landscapes(self.landscapes, self.output / "landscape.png")
        draw_densities(self.densities, self.output / "density.png")
        write_text(self.output / "report.html", self._page())

    def _page(self) -> str:
        """An HTML page of all results, in one file."""
        return results_page(
            self.measurements,
            self.landscapes,
            self.settings,
            len(self._x),
            landscape=(self.output / "landscape.png").read_bytes(),
            density=(self.output / "density.png").read_bytes(),
        )

    def _measure_model(self, name: str, model: keras.Model) -> None:
        settings = self.settings
        folder = self.output / f"measured-{self._digest(model)}"
        folder.mkdir(parents=True, exist_ok=True)
        data = self._x, self._y
        shared: Any = {"batch_size": settings.batch_size, "verbose": 1}
        hessian = shared | {"variables": settings.variables}

        def products(file: str) -> dict[str, Any]:
            return hessian | {"checkpoint": folder / f"{file}.products"}

        self.landscapes[name] = loss_landscape(
            model,
            *data,
            num_points=settings.points,
            checkpoint=folder / "landscape.npz",
            **shared,
        )
        self.densities[name] = hessian_density(model, *data, **products("density"))
        path = folder / "measurements.json"
        if path.exists():
            content = read_json(
                path, self._check_content, remedy="Delete it, and measure again."
            )
            self.measurements[name] = Measurements(**content)
            return
        result = hessian_eigenvalues(
            model, *data, k=settings.k, **products("eigenvalues")
        )
        trace = hessian_trace(model, *data, **products("trace"))
        divergence = model_divergence(
            model, *data, eps=settings.eps, perturbation="relative", **shared
        )
        sharp = sharpness(model, *data, eps=settings.eps, **shared)
        logs, chance_logs = (
            model.evaluate(
                self._x, y, batch_size=settings.batch_size, verbose=0, return_dict=True
            )
            for y in (self._y, np.random.default_rng(0).permutation(self._y))
        )
        penalty = sum(
            as_float(v.regularizer(v))
            for v in base_model(model).trainable_variables
            if v.regularizer is not None
        )
        measurements = Measurements(
            loss=logs["loss"],
            data_loss=logs["loss"] - penalty,
            chance_loss=chance_logs["loss"] - penalty,
            accuracy=logs.get("accuracy", self._accuracy(model)),
            divergence=(divergence.mean, divergence.standard_error),
            mean_increase=(sharp.mean_increase, *sharp.mean_interval),
            largest_increase=(sharp.largest_increase, *sharp.largest_interval),
            eigenvalues=[float(value) for value in result.eigenvalues],
            converged=result.converged,
            trace=(trace.value, trace.standard_error),
        )
        write_text(path, json.dumps(asdict(measurements), indent=1))
        self.measurements[name] = measurements

    def _check_content(self, content: Any) -> None:
        """Raise an error if a file of measurements has another form."""
        loss = dict.fromkeys(("loss", "data_loss", "chance_loss"), (int, float))
        lengths = {"divergence": 2, "trace": 2, "eigenvalues": self.settings.k}
        lengths |= dict.fromkeys(("mean_increase", "largest_increase"), 3)
        expect_object(content, **loss, **dict.fromkeys(lengths, list), converged=bool)
        for name, length in lengths.items():
            values = content[name]
            if [type(value) for value in values] != [float] * length:
                raise ValueError(f"its {name!r} are {values!r:.100}")
        Measurements(**content)

    def _accuracy(self, model: keras.Model) -> float | None:
        """The share of right classes, `None` if the task is another."""
        outputs = model.predict(self._x, batch_size=self.settings.batch_size, verbose=0)
        labels = self._y
        if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
            return None
        if outputs.shape[1] > 1 and outputs.shape == labels.shape:
            labels = np.argmax(labels, axis=1)
        is_classes = np.issubdtype(labels.dtype, np.integer)
        if outputs.shape[1] == 1 or not is_classes or labels.size != len(outputs):
            return None
        return float(np.mean(np.argmax(outputs, axis=1) == labels.ravel()))

    def _warn_of_chance(self, name: str, console: Console) -> None:
        measured = self.measurements[name]
        loss, chance = measured.data_loss, measured.chance_loss
        if chance - loss < _CHANCE * abs(chance):
            console.print(
                f"Warning: the loss of {name} on these data, {loss:.4g}, is that of "
                f"chance: {chance:.4g} with the labels in random order. Its flatness "
                "means little then. Are the inputs scaled as in training?",
                style="yellow",
            )

    def _digest(self, model: keras.Model) -> str:
        """A name for the combination of model, data and settings."""
        parts = asdict(self.settings), model.get_compile_config(), model.to_json()
        digest = hashlib.sha256(repr((_FORMAT, *parts)).encode())
        for array in (*model.get_weights(), self._x, self._y):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:12]

    def table(self) -> Table:
        """One row for each measurement, one column for each model."""
        return results_table(self.measurements, self.settings, len(self._x))
