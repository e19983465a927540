"""Say that the exponents of runs with one recipe describe this recipe, and how far tuning could move them.

At a budget C, the log loss of tuned runs is about t (n - n*)^2 / 2, with n = log N and n* ~ a* log C. A rate u (a log)
that is not the best one adds k (u - u*)^2 / 2. With w = x - y, the best rate u* = x log N + y log D is w n + y log C
and a constant. With one u for all runs, the curve over n has the curvature c = t + k w^2, and its minimum grows with
the exponent a = (t a* - k w y) / c. So a* - a = k w (w a + y) / (c - k w^2), where the runs show a and c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit import optimum
from dlm.fit.fitted import Fitted
from dlm.fit.points import NAN, Interval

if TYPE_CHECKING:
    import pandas as pd

LEAST_RATES = 3  # with fewer, the best learning rate cannot lie between two others
DRIFTS = {  # published exponents of N and D of the best rate
    "Li et al. 2503.04715": (-0.713, 0.307),
    "Bjorck et al. 2409.19913": (-0.23, -0.32),
    "Porian et al. 2406.19146": (-0.36, 0.0),
    "DeepSeek 2401.02954": (-0.125, -0.125),
}
COST_OF_TWO = 0.005  # share of the loss for a rate off by a factor of two; the 1,911 runs of Li et al. show 0.54 %
STEP = 0.2  # of log N, for the curvature of a surface


def told(frame: pd.DataFrame, result: Fitted) -> dict[str, Any] | None:
    """What `Fitted.tuning` holds of runs that were not tuned; None if they were, or if the table does not show it."""
    where = where_tuned(frame)
    if where is None:
        return None
    low, high = sensitivity(result)
    said = f"untuned: these exponents describe this recipe; its learning rate was tuned {where}"
    if np.isfinite(low + high):
        said += (
            f"; if the best rate drifted as published ({text.listed([*DRIFTS])}) and a rate off by a factor of two "
            f"cost {COST_OF_TWO:.1%} of the loss, tuning would move a by {low:+.2f} to {high:+.2f} (tuning moved that "
            "of Porian et al. from 0.57 to 0.50)"
        )
    return {"tuned": False, "sentence": said, "a_moves": [low, high]}


def where_tuned(runs: pd.DataFrame) -> str | None:
    """At which ends of the budgets the rate was tuned, in words; None if at both, or if that is not known.

    It was tuned at a budget if the runs of the size with the lowest loss have three or more rates, and the best of
    these is neither the lowest nor the highest.
    """
    needed = ["learning_rate", "budget", "params"]
    if not {*needed} <= {*runs} or runs[needed].isna().any(axis=None):
        return None
    ends = (runs["budget"].min(), runs["budget"].max())
    tuned = [text.flops(end) for end in ends if _is_tuned(runs[runs["budget"] == end])]
    if len(tuned) == len(ends):
        return None
    return f"at {tuned[0]} FLOPs only" if tuned else "neither at the lowest nor at the highest budget"


def _is_tuned(runs: pd.DataFrame) -> bool:
    best = runs.sort_values("loss").iloc[0]
    rates = runs[runs["params"] == best["params"]]["learning_rate"].unique()
    return len(rates) >= LEAST_RATES and bool(rates.min() < best["learning_rate"] < rates.max())


def sensitivity(result: Fitted) -> Interval:
    """The lowest and the highest change of a by tuning, over the published drifts; NaN without an exponent a.

    A drift that would make up more than half of the curvature that the runs show is left out: at this cost of a rate
    off by a factor of two, the runs contradict it.
    """
    a, c = result.allocation.a, _curvature(result)
    k = 2 * COST_OF_TWO / np.log(2.0) ** 2
    if not (np.isfinite(a) and c > 0):
        return NAN, NAN
    moves = [shift_of_a(a, c, k, x, y) for x, y in DRIFTS.values() if c > 2 * k * (x - y) ** 2]
    return (min(moves), max(moves)) if moves else (NAN, NAN)


def shift_of_a(a: float, c: float, k: float, x: float, y: float) -> float:
    """How much larger a is with the best rate for every run than the a of one rate for all (the top of this file)."""
    w = x - y
    return float(k * w * (w * a + y) / (c - k * w**2))


def _curvature(result: Fitted) -> float:
    """The second derivative of log L over log N at a fixed C in the middle of the budgets; NaN if it is not known."""
    if result.law == "isoflop":
        found = [2 * m.coefficients[2] / m.L for m in result.usable]
        return float(np.median(found)) if found else NAN
    if result.surface is None or result.points is None or not result.params:
        return NAN
    flops = float(np.exp(np.log(result.points.budgets()).mean()))
    row = optimum.as_rows(result.surface, result.params)
    log_n = np.log(optimum.best(result.surface, row, flops, result.cost)[:, :1]) + np.array([[-STEP, 0.0, STEP]])
    low, middle, high = result.surface.predict(row, log_n, np.log(flops) - result.cost.log_per_token(log_n))[0].tolist()
    return float((low + high - 2 * middle) / STEP**2 / middle)
