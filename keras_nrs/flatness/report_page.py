"""The table and the page of `keras-nrs flatness`."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
from rich.table import Table

from keras_nrs import _page
from keras_nrs.flatness.measurements import Measurements
from keras_nrs.flatness.measurements import Settings
from keras_nrs.flatness.planes import Losses
from keras_nrs.flatness.surface import surfaces

_CAPTION = (
    "±: standard error over the random vectors or perturbations. (a to b): 95 % "
    "interval, over perturbations or batches of the data. Increases are at "
    "perturbations of each filter; the largest is a lower bound."
)


def results_rows(
    measurements: Mapping[str, Measurements], settings: Settings
) -> dict[str, list[str]]:
    """The cells of the table: for each measurement one for each model."""
    measured = measurements.values()
    eps = f"eps {settings.eps:g}"
    rows = {
        "accuracy": [_format_share(m.accuracy) for m in measured],
        "loss": [f"{m.loss:.4g}" for m in measured],
        f"model divergence, relative {eps}": [
            _format_estimate(m.divergence) for m in measured
        ],
        f"mean loss increase, {eps}": [
            _format_interval(m.mean_increase) for m in measured
        ],
        f"largest loss increase, {eps}": [
            _format_interval(m.largest_increase) for m in measured
        ],
    }
    for i in range(settings.k):
        number = f" {i + 1}" if settings.k > 1 else ""
        rows[f"largest Hessian eigenvalue{number}"] = [
            f"{m.eigenvalues[i]:.4g}{'' if m.converged else ' (not converged)'}"
            for m in measured
        ]
    rows["trace of the Hessian"] = [_format_estimate(m.trace) for m in measured]
    return rows


def results_table(
    measurements: Mapping[str, Measurements], settings: Settings, num_samples: int
) -> Table:
    """One row for each measurement, one column for each model."""
    table = Table(
        title=f"Flatness on {num_samples} samples, weights: {settings.variables}",
        caption=_CAPTION,
    )
    table.add_column("")
    for name in measurements:
        table.add_column(name, justify="right")
    for row, cells in results_rows(measurements, settings).items():
        # On lines of their own, so that two models fit in 80 columns.
        table.add_row(row, *(cell.replace(" (", "\n(") for cell in cells))
    return table


def results_page(
    measurements: Mapping[str, Measurements],
    landscapes: Mapping[str, Losses],
    settings: Settings,
    num_samples: int,
    *,
    landscape: bytes,
    density: bytes,
) -> str:
    """An HTML page of all results, in one file.

    Args:
        measurements: By the names of the models, as the next.
        landscapes: Their landscapes.
        settings: The settings of all measurements.
        num_samples: Number of samples.
        landscape: A PNG file of the landscapes.
        density: A PNG file of the spectra.
    """
    rows = results_rows(measurements, settings)
    return _page.page(
        f"Flatness of {', '.join(measurements)}",
        [
            _page.note(
                f"Measured on {num_samples} samples with Keras {keras.__version__} on "
                f"{keras.config.backend()}; weights of the Hessian: "
                f"{settings.variables}. {_CAPTION}"
            ),
            _page.table([["", *measurements], *([k, *v] for k, v in rows.items())]),
            _page.heading("The loss around each model"),
            _page.picture(
                landscape,
                "Loss along two random directions, scaled filter by filter: 1 is the "
                "norm of the weights. The cross is the model.",
            ),
            surfaces(landscapes, label="loss"),
            _page.note(
                "The same as surfaces, on a logarithmic scale if the loss is positive. "
                "Drag them, or use the arrow keys, to turn them."
            ),
            _page.heading("Spectra of the Hessian"),
            _page.picture(
                density,
                "Density of the eigenvalues of the Hessian. Eigenvalues far from 0 are "
                "steep directions.",
            ),
        ],
    )


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _format_estimate(estimate: Sequence[float]) -> str:
    mean, error = estimate
    return f"{mean:.4g} ± {error:.2g}"


def _format_interval(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    if np.isnan(low):
        return f"{value:.4g}"
    return f"{value:.4g} ({low:.2g} to {high:.2g})"
