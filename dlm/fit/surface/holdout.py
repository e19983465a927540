"""holdout: refit without the top budgets, and compare with what was found there. Called by surface and gate.

Leave-future-out: the only check of an extrapolation that the runs themselves allow.
"""

from __future__ import annotations

import numpy as np

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.engine.search import Norm, solve
from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points

SPARE = 2  # points beyond one a parameter that a refit needs


def leave_future_out(
    points: Points, law: Law, how: Norm, fixed: dict[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """`without_top_1`, `without_top_2`: signed and root-mean-square relative error of the loss predicted there."""
    found = {}
    for k in (1, 2):
        level, cut = _cut(points, k)
        kept, top = points.take(level < cut), points.take(level >= cut)
        free = len(law.params) - len(fixed or {})
        if len(kept) <= free + SPARE or len(np.unique(level[level < cut])) < 2:
            continue
        try:
            params = solve(kept, law, how, fixed).params
        except UserError:  # the lower budgets alone show no surface: nothing to report
            continue
        rows = optimum.as_rows(law, params)
        features = [v[None] for v in law.features(top)]
        expected = law.loss(law.theta(rows, np.zeros(len(features))), tuple(features))[0]
        error = expected / top.loss - 1.0
        found[f"without_top_{k}"] = {
            "from_flops": cut,
            "num_held_out": float(len(top)),
            "L_error": float(error.mean()),
            "L_rms_error": float(np.sqrt((error**2).mean())),
        }
    return found


def _cut(points: Points, k: int) -> tuple[Array, float]:
    """What is compared (budget or FLOPs) and the k-th level from the top; half decades where there are no levels."""
    level, levels = points.flops if points.budget is None else points.budget, points.budgets()
    if len(levels) > len(points) / 3:
        return level, float(levels[-1] / 10 ** (k / 2))
    return level, float(levels[max(-k, -len(levels))])
