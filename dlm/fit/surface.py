"""surface: (N, D, L) points -> the Chinchilla law, at its global optimum. Called by table, cli and notebooks.

L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2203.15556, approach 3; numbers corrected by Besiroglu et
al. 2404.10102). Variable projection finds the basins, Newton finishes them; the lowest is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dlm.errors import UserError, unknown
from dlm.fit import optimum, scan, solver, text
from dlm.fit.points import Array, Cost, Points, as_points, cost_of
from dlm.fit.result import NAN, FitResult, Optimum

LAWS = ("chinchilla",)
NORMS = ("huber", "mse", "l1")
SPACES = ("log", "raw")
NUM_PARAMS = 5
EXPONENT_RANGE = (0.02, 3.0)  # outside, an exponent says that the points do not see the term
TOP = 1.05  # times the highest C still counts as inside
ONE_BUDGET = 1.25  # a smaller range of C is one budget: L(N, D) is then seen along one curve only
ZERO = 1e-3  # E below this fraction of the lowest loss counts as zero


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
    flops: npt.ArrayLike | None = None,
    budget: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    cluster: npt.ArrayLike | None = None,
    convention: str | None = None,
    at: Sequence[float] = (),
    label: str = "",
) -> FitResult:
    """Fit L(N, D) and say what is best at each C of `at` (FLOPs).

    params, tokens: counts; loss: nats/token; flops: the cost of each run in `convention` (6 N D if absent);
    norm: 'huber' with its corner `delta`, 'mse' (sum of squares) or 'l1', of log-loss or raw-loss residuals;
    cluster: points with one value share noise. Raises UserError for unusable input. Intervals: `bootstrap`.
    """
    _check(law, norm, space, delta)
    points = as_points(
        params,
        tokens,
        loss,
        flops=flops,
        budget=budget,
        weights=weights,
        cluster=cluster,
        convention=convention,
    )
    if points.flops.max() < ONE_BUDGET * points.flops.min():
        raise UserError("all runs cost nearly the same C: a surface needs runs at two budgets or more")
    found = solve(points, norm=norm, delta=delta, space=space)
    cost, span, top = cost_of(points), optimum.span_of(points), float(points.flops.max())
    warnings = (*_warnings(points, found), *reach_warnings(law, at, top))
    return FitResult(
        law=law,
        loss=norm,
        space=space,
        delta=delta if norm == "huber" else NAN,
        n=len(points),
        params=found.params,
        objective=found.objective,
        allocation=optimum.allocation(law, found.params, span, cost),
        at=best_at(law, found.params, cost, at, top),
        holdout=_holdout(points, norm=norm, delta=delta, space=space),
        status="warned" if warnings else "ok",
        warnings=warnings,
        label=label,
        points=points,
        cost=cost,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The lowest minimum, and whether another within 1 % of it has exponents that differ by over 10 %."""

    params: dict[str, float]
    objective: float
    converged: bool
    has_rivals: bool


def solve(points: Points, *, norm: str, delta: float, space: str) -> Solution:
    """The global minimum over the five parameters. Raises UserError where no surface exists."""
    if len(points) <= NUM_PARAMS:
        raise UserError(f"{len(points)} points cannot fit a surface of {NUM_PARAMS} parameters: give 6 or more")
    problem = solver.problem_of(points, space=space, norm=norm, delta=delta)
    target, weight = solver.target_of(problem, points.loss)[None], points.weight[None]
    starts = scan.many_starts(problem, points.loss, points.weight, target[0])
    if not len(starts):
        raise UserError("no surface fits: the loss does not fall with params and with tokens over these points")
    starts = np.concatenate([starts, *_eased(problem, starts, target, weight)])
    rough, values, _ = solver.minimise(problem, starts, target, weight, max_steps=40)
    near = rough[values <= 1.02 * values.min()]
    thetas, values, done = solver.minimise(problem, near, target, weight, max_steps=500)
    best = int(values.argmin())
    minima = thetas[done & (values <= 1.01 * values[best])][:, [1, 3]]
    rivals = (np.abs(minima / thetas[best, [1, 3]] - 1) > 0.1).any(axis=1).any()
    named = solver.natural(problem, thetas[[best]])[0].tolist()
    return Solution(
        params=dict(zip(optimum.PARAMS["chinchilla"], named, strict=True)),
        objective=float(values[best]),
        converged=bool(done[best]),
        has_rivals=bool(rivals),
    )


def _eased(problem: solver.Problem, starts: Array, target: Array, weight: Array) -> list[Array]:
    """More starts for norms with corners: the minima of squares, and of Huber's norm with a wider corner."""
    if problem.norm == "mse":
        return []
    smooth = replace(problem, norm="mse")
    wide = replace(problem, norm="huber", delta=10.0 * problem.delta)
    squares, _, _ = solver.minimise(smooth, starts, target, weight, max_steps=40)
    return [squares, solver.minimise(wide, squares, target, weight, max_steps=40)[0]]


def best_at(law: str, params: dict[str, float], cost: Cost, at: Sequence[float], top: float) -> dict[float, Optimum]:
    """N*, D*, L* of the fit at each C, without intervals; `top` is the highest C that the fit rests on."""
    rows = optimum.as_rows(law, params)
    found = {float(c): optimum.best(law, rows, float(c), cost)[0].tolist() for c in at}
    return {c: Optimum(N=n, D=d, L=loss, reach=c / top) for c, (n, d, loss) in found.items()}


def reach_warnings(law: str, at: Sequence[float], top: float) -> list[str]:
    """What is asked beyond `top`, and where the interval of L is withheld (see `optimum.REACH`)."""
    limit, beyond = optimum.REACH[law], sorted(c for c in at if c > TOP * top)
    if not beyond:
        return []
    what = "the highest C used"
    warned = [f"C = {text.flops(beyond[-1])} is beyond {what} ({text.flops(top)}): true only if the law keeps its form"]
    far = [c for c in beyond if c > limit * top]
    if far:
        why = "the form of the law matters too much that far out" if limit > TOP else "a straight line has no floor"
        warned.append(f"no interval for L at C = {text.flops(far[0])}{' and above' if far[1:] else ''}: {why}")
    return warned


def _check(law: str, norm: str, space: str, delta: float) -> None:
    for what, value, allowed in (("law", law, LAWS), ("loss norm", norm, NORMS), ("space", space, SPACES)):
        if value not in allowed:
            raise unknown(what, value, allowed)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta is {delta}: Huber's corner must be a finite number above 0 (1e-3 is usual)")


def _warnings(points: Points, found: Solution) -> list[str]:
    warned = [] if found.converged else ["the fit did not converge: take its numbers as rough"]
    if found.params["E"] < ZERO * points.loss.min():
        warned.append(
            "E, the loss that no run gets below, came out at zero: the runs do not reach far enough to see it"
        )
    for name in ("alpha", "beta"):
        if not EXPONENT_RANGE[0] < found.params[name] < EXPONENT_RANGE[1]:
            warned.append(f"{name} = {found.params[name]:.3g} is not believable: these points do not determine it")
    for name in ("A", "B"):
        if not 0 < found.params[name] < np.inf:
            warned.append(f"{name} came out as {found.params[name]:g}: the law has no optimum, and none is given")
    if found.has_rivals:
        warned.append("minima with other exponents lie within 1 % of the best: the exponents are not well determined")
    if len(points) < 2 * NUM_PARAMS:
        warned.append(f"{len(points)} points for {NUM_PARAMS} parameters: expect wide or missing intervals")
    return warned + _design_warnings(points)


def _design_warnings(points: Points) -> list[str]:
    log_n, log_d = np.log(points.params), np.log(points.tokens)
    if min(np.ptp(log_n), np.ptp(log_d)) < 1e-9:
        return ["all runs have one size or one number of tokens: the law has nothing to tell them apart by"]
    if np.corrcoef(log_n, log_d)[0, 1] > 0.97:
        return ["all runs have nearly one ratio of tokens to parameters: N and D cannot be told apart"]
    return []


def _holdout(points: Points, *, norm: str, delta: float, space: str) -> dict[str, dict[str, float]]:
    """Refit without the top one and top two budgets: the relative error of the predicted loss there (leave-
    future-out).
    """
    found = {}
    for k in (1, 2):
        level, cut = _cut(points, k)
        kept, top = points.take(level < cut), points.take(level >= cut)
        if len(kept) < NUM_PARAMS + 3 or len(np.unique(level[level < cut])) < 2:
            continue
        try:
            rows = optimum.as_rows("chinchilla", solve(kept, norm=norm, delta=delta, space=space).params)
        except UserError:  # the lower budgets alone show no surface: nothing to report
            continue
        error = optimum.surface(rows, np.log(top.params)[None], np.log(top.tokens)[None])[0] / top.loss - 1.0
        found[f"without_top_{k}"] = {
            "from_flops": cut,
            "num_held_out": float(len(top)),
            "L_error": float(error.mean()),
            "L_rms_error": float(np.sqrt((error**2).mean())),
        }
    return found


def _cut(points: Points, k: int) -> tuple[Array, float]:
    """What is compared (budget or FLOPs) and the k-th level from the top; half decades where there are no
    levels.
    """
    level, levels = points.flops if points.budget is None else points.budget, points.budgets()
    if len(levels) > len(points) / 3:
        return level, float(levels[-1] / 10 ** (k / 2))
    return level, float(levels[max(-k, -len(levels))])
