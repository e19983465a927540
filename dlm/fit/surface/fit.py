"""surface: (N, D, L) points -> a loss surface L(N, D), at its global optimum. Called by table, gate and notebooks.

The laws are in `dlm.fit.laws`; Chinchilla's is the default (2203.15556, approach 3; corrected by 2404.10102).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit import optimum
from dlm.fit.engine import newton
from dlm.fit.engine.search import Norm, Solution, solve
from dlm.fit.fitted import Allocation
from dlm.fit.laws import LAWS
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.law import Law
from dlm.fit.optimum import best_at, reach_warnings
from dlm.fit.points import NAN, Cost, Points, as_points, cost_of
from dlm.fit.result import FitResult
from dlm.fit.surface import diagnose, noise
from dlm.fit.surface.holdout import leave_future_out

ONE_BUDGET = 1.25  # a smaller range of C is one budget: L(N, D) is then seen along one curve only


MOST_ROUNDS, SETTLED = 200, 1e-9  # of the data-constrained law's fixed point


ONE_EPOCH = 1.05  # tokens over unique tokens, up to which nothing counts as repeated


@np.errstate(all="ignore")  # numbers that overflow are found and named in the warnings
def fit_surface(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    law: str = "chinchilla",
    norm: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    under_tuned: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    flops: npt.ArrayLike | None = None,
    budget: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | str | None = None,
    cluster: npt.ArrayLike | None = None,
    unique_tokens: npt.ArrayLike | None = None,
    loss_se: npt.ArrayLike | None = None,
    loss_se_own: npt.ArrayLike | None = None,
    convention: str | None = None,
    at: Sequence[float] = (),
    label: str = "",
    holdout: bool = True,
) -> FitResult:
    """Fit L(N, D) and say what is best at each C of `at` (FLOPs).

    params, tokens: counts; loss: nats/token; flops: the cost of each run in `convention` (6 N D if absent);
    norm: 'huber' with its corner `delta`, 'mse' (sum of squares) or 'l1', of log-loss or raw-loss residuals;
    under_tuned: below 1, a point above the law counts by so much less (runs tuned badly can only lie above);
    fixed: parameters pinned, {'E': 1.7} for a known asymptote; weights: numbers, or 'compute' for C over its mean;
    cluster: points with one value share noise; unique_tokens: for the law 'data-constrained'; loss_se: standard error
    of each loss (nats/token) where it is a Monte Carlo estimate on text and noise that all runs share, loss_se_own the
    part that they do not; holdout: refit without the top budgets. Raises UserError for unusable input.
    Intervals: `bootstrap`.
    """
    _check(law, norm, space, delta, under_tuned)
    points = as_points(
        params,
        tokens,
        loss,
        flops=flops,
        budget=budget,
        weights=weights,
        cluster=cluster,
        unique=unique_tokens,
        loss_se=loss_se,
        loss_se_own=loss_se_own,
        convention=convention,
    )
    if points.flops.max() < ONE_BUDGET * points.flops.min():
        raise UserError("all runs cost nearly the same C: a surface needs runs at two budgets or more")
    how = Norm(norm=norm, delta=delta, space=space, under_tuned=under_tuned)
    pinned = dict(fixed or {})
    surface = _law(law, points, how, pinned)
    return fit_points(points, surface, how, pinned, at=at, label=label, holdout=holdout)


def fit_points(
    points: Points,
    surface: Law,
    how: Norm,
    pinned: dict[str, float],
    *,
    at: Sequence[float] = (),
    label: str = "",
    holdout: bool = True,
) -> FitResult:
    """`fit_surface` of points that are already checked."""
    found = solve(points, surface, how, pinned)
    if isinstance(surface, DataConstrained) and not set(Chinchilla.params) <= set(pinned):
        surface, found = _consistent(points, surface, found, how, pinned)
    cost, span, top = cost_of(points), optimum.span_of(points), float(points.flops.max())
    seen = diagnose.surface(points, surface, found)
    scatter = noise.parts(points, found.problem, found.theta)
    warnings = (*seen.warnings, *scatter.warnings(), *reach_warnings(surface.name, at, top))
    return FitResult(
        law=surface.name,
        loss=how.norm,
        space=how.space,
        delta=how.delta if how.norm == "huber" else NAN,
        n=len(points),
        params=found.params,
        objective=found.objective,
        allocation=_allocation(surface, found.params, span, cost),
        at=best_at(surface, found.params, cost, at, top),
        holdout=leave_future_out(points, surface, how, pinned) if holdout else {},
        status="warned" if warnings else "ok",
        warnings=warnings,
        label=label,
        points=points,
        cost=cost,
        surface=surface,
        how=how,
        fixed=pinned,
        rivals=found.rivals,
        outliers=seen.outliers,
        noise=scatter,
    )


def _allocation(law: Law, params: Mapping[str, float], span: tuple[float, float], cost: Cost) -> Allocation:
    """With the unique tokens that it is for, where the law has them."""
    share = optimum.allocation(law, params, span, cost)
    if not isinstance(law, DataConstrained):
        return share
    return replace(share, how=f"{share.how}; for {text.count(law.unique)} unique tokens, the most of any run")


def _law(name: str, points: Points, how: Norm, fixed: Mapping[str, float]) -> Law:
    law = LAWS[name]
    odd = [key for key in fixed if key not in law.pins]
    if odd:
        raise unknown(f"parameter to pin in {name}:", odd[0], sorted(law.pins))
    bad = [key for key, v in fixed.items() if not (np.isfinite(v) and (v > 0 or (key == "E" and v == 0)))]
    if bad:
        raise UserError(f"fixed {bad[0]} is {fixed[bad[0]]}: give a finite number above 0")
    if fixed.get("E", 0.0) >= points.loss.min():
        raise UserError(
            f"fixed E is {fixed['E']}: it must lie below every loss, and the lowest is {points.loss.min():g}"
        )
    if law is not DataConstrained:
        return law()
    if points.unique is None:
        raise UserError("data-constrained needs the unique tokens of every run: a column unique_tokens")
    return DataConstrained(_base(points, how, fixed), float(points.unique.max()))


def _base(points: Points, how: Norm, fixed: Mapping[str, float]) -> dict[str, float]:
    """The Chinchilla law that says which size the unique tokens are best for."""
    assert points.unique is not None
    if set(Chinchilla.params) <= set(fixed):
        return {name: fixed[name] for name in Chinchilla.params}
    once = points.take(points.tokens <= ONE_EPOCH * points.unique)
    try:
        return solve(once, Chinchilla(), how).params
    except UserError as error:
        raise UserError(
            f"data-constrained needs a law of runs that repeat nothing, and the {len(once)} such runs give none "
            f"({error}): add some, or pin E, A, B, alpha and beta"
        ) from error


def _consistent(
    points: Points, law: DataConstrained, found: Solution, how: Norm, fixed: dict[str, float]
) -> tuple[DataConstrained, Solution]:
    """The law whose own E, A, B, alpha, beta say which size its unique tokens are best for: a fixed point."""
    for _ in range(MOST_ROUNDS):
        base = {name: found.params[name] for name in Chinchilla.params}
        moved = max(abs(base[name] / law.base[name] - 1) for name in base)
        if moved < SETTLED:
            break
        law = DataConstrained(base, law.unique)
        rows = np.array([list(found.params.values()), *([r[k] for k in found.params] for r in found.rivals)])
        found = solve(points, law, how, fixed, begin=rows)
    else:
        found = replace(found, converged=False)
    return law, found


def _check(law: str, norm: str, space: str, delta: float, under_tuned: float) -> None:
    allowed = (("law", law, tuple(LAWS)), ("loss norm", norm, newton.NORMS), ("space", space, newton.SPACES))
    for what, value, choices in allowed:
        if value not in choices:
            raise unknown(what, value, choices)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta is {delta}: Huber's corner must be a finite number above 0 (1e-3 is usual)")
    if not 0 < under_tuned <= 1:
        raise UserError(f"under_tuned is {under_tuned}: the share of a point above the law must lie in (0, 1]")
