"""optimum: a fitted law and C FLOPs -> N*, D*, L*, and the exponents a, b. Called by the fits, intervals and report.

Every function takes rows of parameters, one row per bootstrap replicate (R, k): in the order of `Law.params` for a
surface, of `LINE` for the log-log lines of isoflop and envelope (`law` is then None).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlm.fit import text
from dlm.fit.laws import Law
from dlm.fit.points import Array, Cost, Points
from dlm.fit.result import Allocation

LINE = ("N0", "a", "D0", "b", "L0", "c")
REACH_NATS, STEP_NATS = 7.0, 0.05  # the grid of log N searched around the 6 N D optimum
WIDEST_NATS = 40.0  # the same where no 6 N D optimum is known: from 1 to e^40 parameters
GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0


def names(law: Law | None) -> tuple[str, ...]:
    """The parameters of a row."""
    return LINE if law is None else law.params


def as_rows(law: Law | None, params: Mapping[str, float]) -> Array:
    """One row (1, k) from named parameters."""
    return np.array([[params[name] for name in names(law)]], dtype=np.float64)


def best(law: Law | None, rows: Array, flops: float, cost: Cost) -> Array:
    """(N*, D*, L*) at C FLOPs, shape (R, 3); NaN rows stay NaN."""
    with np.errstate(all="ignore"):
        if law is None:
            logs = np.log(rows[:, 0::2]) + np.log(flops) * rows[:, 1::2]
            return np.asarray(np.exp(logs), dtype=np.float64)
        log_n = law.optimum_at_6nd(rows, flops / cost.over_6n)
        if log_n is None or not cost.is_6nd:
            log_n = _search(law, rows, flops, cost, log_n)
        log_d = np.log(flops) - cost.log_per_token(log_n)
        return np.stack([np.exp(log_n), np.exp(log_d), law.predict(rows, log_n, log_d)], axis=1)


def _search(law: Law, rows: Array, flops: float, cost: Cost, around: Array | None) -> Array:
    """log N* under cost(N) D = C: the best point of a grid, then golden section between its neighbours."""

    def loss(log_n: Array) -> Array:
        return law.predict(rows, log_n, np.log(flops) - cost.log_per_token(log_n))

    if around is None:
        offsets, around = np.arange(0.0, WIDEST_NATS, STEP_NATS), np.zeros(len(rows))
    else:
        offsets = np.arange(-REACH_NATS, REACH_NATS + STEP_NATS, STEP_NATS)
    middle = around + offsets[loss(around[:, None] + offsets).argmin(axis=1)]
    low, high = middle - STEP_NATS, middle + STEP_NATS
    for _ in range(30):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        down = loss(left) < loss(right)
        low, high = np.where(down, low, left), np.where(down, right, high)
    found = np.asarray((low + high) / 2.0, dtype=np.float64)
    return np.where(np.isfinite(rows).all(axis=1), found, np.nan)


def span_of(points: Points) -> tuple[float, float]:
    """The range of C over which exponents are measured: that of the points, at least a factor of 4."""
    low, high = float(points.flops.min()), float(points.flops.max())
    return (low, high) if high >= 4.0 * low else (low / 2.0, high * 2.0)


def exponents(law: Law | None, rows: Array, span: tuple[float, float], cost: Cost) -> Array:
    """(a, b) of N* ~ C^a and D* ~ C^b, shape (R, 2)."""
    if law is None:
        return rows[:, [1, 3]]
    a = law.exponents_at_6nd(rows) if cost.is_6nd else None
    if a is not None:
        return np.stack([a, 1.0 - a], axis=1)
    low, high = (np.log(best(law, rows, flops, cost)[:, :2]) for flops in span)
    return np.asarray((high - low) / np.log(span[1] / span[0]), dtype=np.float64)


def allocation(law: Law, params: Mapping[str, float], span: tuple[float, float], cost: Cost) -> Allocation:
    """The exponents of a surface, and how they were found."""
    rows = as_rows(law, params)
    a, b = (float(v) for v in exponents(law, rows, span, cost)[0])
    if cost.is_6nd and law.exponents_at_6nd(rows) is not None:
        same = "a = b = 1/2, as one exponent for N and D has it"
        how = same if law.name == "tied" else "a = beta/(alpha+beta), b = alpha/(alpha+beta)"
        return Allocation(a=a, b=b, how=f"closed form: {how}, since C = 6 N D")
    slope = f"mean slope between C = {text.flops(span[0])} and {text.flops(span[1])}"
    under = "6 N D = C" if cost.is_6nd else "cost(N) D = C, cost from the rows' flops/tokens"
    return Allocation(a=a, b=b, how=f"numerical: N* minimises L under {under}; {slope}")
