"""isoflop: runs grouped by budget -> a minimum per budget and the lines N*(C), D*(C), L*(C).
Called by table, cli, notebooks.

Approach 2 of Hoffmann et al. (2203.15556). A curve without an interior minimum is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dlm.fit import optimum, parabola
from dlm.fit.points import NAN, Array, Cost, Points, as_points, cost_of
from dlm.fit.result import Allocation, FitResult, Minimum
from dlm.fit.surface import best_at, reach_warnings

HOW = "slopes of the log-log lines through the isoFLOP minima; D* = C / cost(N*)"
LEAST_BUDGETS = 2
WIDE = 20.0  # largest over smallest size; noise-free Chinchilla curves of 16 / 64 put D* off by 1.3 / 2.9 %


def fit_isoflop(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    budget: npt.ArrayLike,
    *,
    flops: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    convention: str | None = None,
    at: Sequence[float] = (),
    label: str = "",
) -> FitResult:
    """Parabolas of loss (nats/token) over log N, one per distinct `budget` (FLOPs), and the lines through
    their minima.

    D* is budget / cost(N*), cost being flops/tokens of the rows (6 N without `flops`). Least squares on raw
    loss. With fewer than two usable budgets there is no line: status 'refused', and `minima` says why.
    """
    points = as_points(params, tokens, loss, flops=flops, budget=budget, weights=weights, convention=convention)
    cost = cost_of(points)
    minima = tuple(_with_tokens(m, cost) for m in minima_of(points))
    usable = [m for m in minima if m.usable]
    blank = FitResult(
        law="isoflop",
        loss="mse",
        space="raw",
        delta=NAN,
        n=len(points),
        minima=minima,
        label=label,
        points=points,
        cost=cost,
        objective=_squares(points, minima),
    )
    if len(usable) < LEAST_BUDGETS:
        return _refused(blank, len(usable))
    return _with_lines(blank, points, usable, at)


def minima_of(points: Points) -> list[Minimum]:
    """One Minimum per budget, rising, D not yet known."""
    found = []
    for level in points.budgets():
        rows = points.at_budget(level)
        found.append(parabola.minimum(float(level), rows.params, rows.loss, rows.weight))
    return found


def lines(budgets: Array, logs: Array) -> Array:
    """Log-log least squares: logs of N*, D*, L* (R, budgets, 3) -> (N0, a, D0, b, L0, c), (R, 6)."""
    z = np.log(budgets)
    centred = z - z.mean()
    slope = np.einsum("b,rbk->rk", centred / (centred @ centred), logs)
    start = logs.mean(axis=1) - slope * z.mean()
    with np.errstate(over="ignore"):
        return np.stack([np.exp(start), slope], axis=2).reshape(len(logs), 6)


def _with_tokens(minimum: Minimum, cost: Cost) -> Minimum:
    if not minimum.usable:
        return minimum
    log_cost = cost.log_per_token(np.log([minimum.N]))[0]
    return replace(minimum, D=minimum.budget / float(np.exp(log_cost)))


def _with_lines(blank: FitResult, points: Points, usable: list[Minimum], at: Sequence[float]) -> FitResult:
    fitted = _line(usable)
    warnings = (*_warnings(points, blank.minima, usable), *reach_warnings("isoflop", at, usable[-1].budget))
    return replace(
        blank,
        params=fitted,
        allocation=Allocation(a=fitted["a"], b=fitted["b"], how=HOW),
        at=best_at(None, fitted, blank.cost, at, usable[-1].budget),
        holdout=_holdout(usable),
        status="warned" if warnings else "ok",
        warnings=warnings,
    )


def _line(usable: Sequence[Minimum]) -> dict[str, float]:
    logs = np.log([[m.N, m.D, m.L] for m in usable])
    fitted = lines(np.array([m.budget for m in usable]), logs[None])[0].tolist()
    return dict(zip(optimum.LINE, fitted, strict=True))


def _refused(blank: FitResult, usable: int) -> FitResult:
    told = [m.detail for m in blank.minima if m.reason]
    has = f"there {'is' if usable == 1 else 'are'} {usable or 'none'}"
    why = f"no law: a line needs {LEAST_BUDGETS} budgets with an interior minimum, and {has}"
    return replace(blank, status="refused", warnings=(why, *told), allocation=Allocation(how="refused: no line"))


def _warnings(points: Points, minima: Sequence[Minimum], usable: Sequence[Minimum]) -> list[str]:
    warned = [f"left out: {m.detail}" for m in minima if m.reason]
    spans = [float(np.ptp(np.log(points.at_budget(m.budget).params))) for m in usable]
    if np.median(spans) > np.log(WIDE):
        span = f"a factor of {np.exp(np.median(spans)):.0f}"
        warned.append(f"the curves span {span} in size, and parabolas fit narrower ones: the minima may be biased")
    if len(usable) == LEAST_BUDGETS:
        warned.append("two budgets only: the lines pass through both exactly, and nothing checks their straightness")
    return warned


def _holdout(usable: Sequence[Minimum]) -> dict[str, dict[str, float]]:
    """The lines without the top one and two minima: relative errors of what they predict there (leave-future-
    out).
    """
    found = {}
    for k in (1, 2):
        if len(usable) - k < LEAST_BUDGETS:
            break
        rows = optimum.as_rows(None, _line(usable[:-k]))
        top = usable[-1]
        n, d, loss = optimum.best(None, rows, top.budget, Cost())[0].tolist()
        errors = {"N_error": n / top.N - 1, "D_error": d / top.D - 1, "L_error": loss / top.L - 1}
        found[f"without_top_{k}"] = {"from_flops": top.budget, **errors}
    return found


def _squares(points: Points, minima: Sequence[Minimum]) -> float:
    """Sum of weighted squared residuals over the curves that have a parabola."""
    total = 0.0
    for m in minima:
        if np.isfinite(m.centre):
            rows = points.at_budget(m.budget)
            residual = rows.loss - np.polyval(m.coefficients[::-1], np.log(rows.params) - m.centre)
            total += float(rows.weight @ residual**2)
    return total
