"""Refit a surface without the top budgets, and compare it with the held-out runs (leave-future-out).

This is the only check of an extrapolation that the runs themselves allow.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.engine.newton import Norm
from dlm.fit.engine.search import solve
from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points

SPARE = 2  # points that a refit needs beyond one per parameter


def leave_future_out(points: Points, law: Law, how: Norm, fixed: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Compute the errors of predictions for the top one and two budgets, from fits without these budgets.

    Returns:
        For each of `without_top_1` and `without_top_2`, if the remaining runs suffice: the lowest budget held out
        (FLOPs), the number of runs held out, and the mean and root-mean-square relative error of the predicted loss.
    """
    found = {}
    for k in (1, 2):
        level, cut = _cut(points, k)
        kept, top = points.take(level < cut), points.take(level >= cut)
        if len(kept) <= len(law.params) - len(fixed) + SPARE or len(np.unique(level[level < cut])) < 2:
            continue
        try:
            params = solve(kept, law, how, fixed).params
        except UserError:  # no surface describes the lower budgets alone, so there is nothing to report
            continue
        features = tuple(v[None] for v in law.features(top))
        theta = law.theta(optimum.as_rows(law, params), np.zeros(len(features)))
        error = law.loss(theta, features)[0] / top.loss - 1.0
        found[f"without_top_{k}"] = {
            "from_flops": cut,
            "num_held_out": float(len(top)),
            "L_error": float(error.mean()),
            "L_rms_error": float(np.sqrt((error**2).mean())),
        }
    return found


def _cut(points: Points, k: int) -> tuple[Array, float]:
    """The level of each point (its budget or FLOPs), (n,), and the level from which points are held out.

    Points are held out from the k-th level from the top, or from k half decades below the top if the runs form no
    levels.
    """
    level, levels = points.flops if points.budget is None else points.budget, points.budgets()
    if len(levels) > len(points) / 3:
        return level, float(levels[-1] / 10 ** (k / 2))
    return level, float(levels[max(-k, -len(levels))])
