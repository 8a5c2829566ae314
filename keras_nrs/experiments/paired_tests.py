"""Each arm against the baseline of its cell, in pairs of equal seeds."""

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from keras_nrs.experiments.results import BASELINE
from keras_nrs.experiments.results import CELL
from keras_nrs.experiments.t_test import t_test


def paired_differences(
    runs: pd.DataFrame, measure: str, *, log: bool = False
) -> pd.DataFrame:
    """Differences of each arm to the baseline of its cell, paired by seed.

    Args:
        runs: Runs, as from `read_runs()`.
        measure: A column of `runs`.
        log: Whether to take the logarithm of `measure` first.

    Returns:
        A row for each cell and arm: the columns `CELL` and `arm`, the attributes of a
        `TTest`, and the numbers of pairs in which the arm is `higher` and `lower`.
    """
    rows = []
    for cell, of_cell in runs.groupby(CELL, sort=False):
        values = of_cell.pivot(index="seed", columns="arm", values=measure)
        if BASELINE not in values:
            continue
        for arm in dict.fromkeys(of_cell["arm"]):
            pairs = values[[arm, BASELINE]].dropna().to_numpy(float)
            if arm == BASELINE or not len(pairs):
                continue
            pairs = np.log(pairs) if log else pairs
            change = pairs[:, 0] - pairs[:, 1]
            rows.append(
                dict(zip(CELL, cell, strict=True))
                | {"arm": arm}
                | t_test(change)._asdict()
                | {"higher": int((change > 0).sum()), "lower": int((change < 0).sum())}
            )
    return pd.DataFrame(rows)


def adjusted(p: pd.Series) -> pd.Series:
    """p-values by Benjamini and Hochberg; NaN stays NaN."""
    tested = p.dropna()
    values = false_discovery_control(tested.to_numpy(float))
    return pd.Series(values, tested.index).reindex(p.index)
