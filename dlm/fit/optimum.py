"""optimum: a fitted law and C FLOPs -> N*, D*, L*, and the exponents a, b.
Called by the fits, resample and report.

Every function takes rows of parameters, one row per bootstrap replicate (R, k), in the order of `PARAMS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlm.fit import text
from dlm.fit.points import Array, Cost, Points
from dlm.fit.result import Allocation

PARAMS = {
    "chinchilla": ("E", "A", "B", "alpha", "beta"),
    "isoflop": ("N0", "a", "D0", "b", "L0", "c"),
    "envelope": ("N0", "a", "D0", "b", "L0", "c"),
}
# Times the highest C of the points: beyond, an interval of L is withheld, for it would assume that the form
# is right.
REACH = {"chinchilla": 10.5, "isoflop": 1.05, "envelope": 1.05}
REACH_NATS, STEP_NATS = 7.0, 0.05  # the grid of log N searched around the 6 N D optimum
GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0


def as_rows(law: str, params: Mapping[str, float]) -> Array:
    """One row (1, k) from named parameters."""
    return np.array([[params[name] for name in PARAMS[law]]], dtype=np.float64)


def best(law: str, rows: Array, flops: float, cost: Cost) -> Array:
    """(N*, D*, L*) at C FLOPs, shape (R, 3); NaN rows stay NaN."""
    if law != "chinchilla":
        with np.errstate(all="ignore"):
            logs = np.log(rows[:, 0::2]) + np.log(flops) * rows[:, 1::2]
            return np.asarray(np.exp(logs), dtype=np.float64)
    with np.errstate(all="ignore"):
        log_n = closed_form(rows, flops)
        if not cost.is_6nd:
            log_n = _search(rows, flops, cost, log_n)
        log_d = np.log(flops) - cost.log_per_token(log_n)
        return np.stack([np.exp(log_n), np.exp(log_d), surface(rows, log_n, log_d)], axis=1)


def surface(rows: Array, log_n: Array, log_d: Array) -> Array:
    """L = E + A/N^alpha + B/D^beta; the logs are (R,) or (R, m)."""
    shape = (-1,) + (1,) * (np.ndim(log_n) - 1)
    e, a, b, alpha, beta = (rows[:, k].reshape(shape) for k in range(5))
    return np.asarray(e + a * np.exp(-alpha * log_n) + b * np.exp(-beta * log_d), dtype=np.float64)


def closed_form(rows: Array, flops: float) -> Array:
    """log N* where C = 6 N D: N* = (alpha A / beta B)^(1/(alpha+beta)) (C/6)^(beta/(alpha+beta)), 2203.15556
    eq. 4.
    """
    _, a, b, alpha, beta = rows.T
    ratio = np.log(alpha * a) - np.log(beta * b)
    return np.asarray((ratio + beta * np.log(flops / 6.0)) / (alpha + beta), dtype=np.float64)


def _search(rows: Array, flops: float, cost: Cost, around: Array) -> Array:
    """log N* under cost(N) D = C: the best point of a grid, then golden section between its neighbours."""

    def loss(log_n: Array) -> Array:
        return surface(rows, log_n, np.log(flops) - cost.log_per_token(log_n))

    offsets = np.arange(-REACH_NATS, REACH_NATS + STEP_NATS, STEP_NATS)
    middle = around + offsets[loss(around[:, None] + offsets).argmin(axis=1)]
    low, high = middle - STEP_NATS, middle + STEP_NATS
    for _ in range(30):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        down = loss(left) < loss(right)
        low, high = np.where(down, low, left), np.where(down, right, high)
    return np.asarray((low + high) / 2.0, dtype=np.float64)


def span_of(points: Points) -> tuple[float, float]:
    """The range of C over which exponents are measured: that of the points, at least a factor of 4."""
    low, high = float(points.flops.min()), float(points.flops.max())
    return (low, high) if high >= 4.0 * low else (low / 2.0, high * 2.0)


def exponents(law: str, rows: Array, span: tuple[float, float], cost: Cost) -> Array:
    """(a, b) of N* ~ C^a and D* ~ C^b, shape (R, 2)."""
    if law != "chinchilla":
        return rows[:, [1, 3]]
    if cost.is_6nd:
        a = rows[:, 4] / (rows[:, 3] + rows[:, 4])
        return np.stack([a, 1.0 - a], axis=1)
    low, high = (np.log(best(law, rows, flops, cost)[:, :2]) for flops in span)
    return np.asarray((high - low) / np.log(span[1] / span[0]), dtype=np.float64)


def allocation(law: str, params: Mapping[str, float], span: tuple[float, float], cost: Cost) -> Allocation:
    """The exponents of the fit itself, and how they were found."""
    a, b = (float(v) for v in exponents(law, as_rows(law, params), span, cost)[0])
    return Allocation(a=a, b=b, how=_how(law, span, cost))


def _how(law: str, span: tuple[float, float], cost: Cost) -> str:
    if law == "isoflop":
        return "slopes of the log-log lines through the isoFLOP minima; D* = C / cost(N*)"
    if law == "envelope":
        return "slopes of the log-log lines through the envelope's points"
    if cost.is_6nd:
        return "closed form: a = beta/(alpha+beta), b = alpha/(alpha+beta), since C = 6 N D"
    slope = f"mean slope between C = {text.flops(span[0])} and {text.flops(span[1])}"
    return f"numerical: N* minimises L under cost(N) D = C, cost from the rows' flops/tokens; {slope}"
