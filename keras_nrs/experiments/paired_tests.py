"""Each arm against its baseline, in pairs of equal seeds."""

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from keras_nrs.experiments.results import CELL
from keras_nrs.experiments.t_test import t_test


def paired_differences(
    runs: pd.DataFrame, measure: str, *, log: bool = False
) -> pd.DataFrame:
    """Differences of each arm to its baseline in the same cell, paired by seed.

    Arms without a pair are left out, and with `log` those of which a pair has a value
    that is not positive.

    Args:
        runs: Runs, as from `read_runs()`.
        measure: A column of `runs`.
        log: Whether to take the logarithm of `measure` first.

    Returns:
        A row for each cell and arm: the columns `CELL` and `arm`, the attributes of a
        `TTest`, and the numbers of pairs in which the arm is `higher` and `lower`.
    """
    rows = []
    for (*cell, arm, baseline), of_arm in runs.groupby(
        [*CELL, "arm", "baseline"], sort=False
    ):
        of_baseline = runs[(runs[[*CELL, "arm"]] == [*cell, baseline]).all(axis=1)]
        pairs = of_arm.merge(of_baseline, on="seed")[[f"{measure}_x", f"{measure}_y"]]
        values = pairs.dropna().to_numpy(float)
        if arm == baseline or not len(values) or (log and (values <= 0).any()):
            continue
        values = np.log(values) if log else values
        change = values[:, 0] - values[:, 1]
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


def holm(p: pd.Series) -> pd.Series:
    """p-values by Holm, which bounds the chance of any false one; NaN stays NaN."""
    ordered = p.dropna().sort_values()
    factors = np.arange(len(ordered), 0, -1)
    return (ordered * factors).cummax().clip(upper=1.0).reindex(p.index)
