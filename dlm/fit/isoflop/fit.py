"""isoflop: runs grouped by budget -> a minimum per budget and the lines N*(C), D*(C), L*(C).
Called by table, cli, notebooks.

Approach 2 of Hoffmann et al. (2203.15556): parabolas over log N there; cubics, Akima curves and log D on request. A
curve without an interior minimum is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dlm.core.errors import unknown
from dlm.fit import optimum
from dlm.fit.fitted import Allocation, Minimum
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.minima import AXES, along, mean_losses, minimum
from dlm.fit.optimum import best_at, reach_warnings
from dlm.fit.points import NAN, Array, Cost, Points, as_points, cost_of
from dlm.fit.result import FitResult

HOW = "slopes of the log-log lines through the isoFLOP minima; D* = C / cost(N*)"


LEAST_BUDGETS = 2


REACH_NATS = 60.0  # how far log N is sought from log FLOPs per token: any unit of N


WIDE = 20.0  # largest over smallest size; noise-free Chinchilla curves of 16 / 64 put D* off by 1.3 / 2.9 %


def fit_isoflop(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    budget: npt.ArrayLike,
    *,
    curve: str = "parabola",
    axis: str = "params",
    flops: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    loss_se: npt.ArrayLike | None = None,
    loss_se_own: npt.ArrayLike | None = None,
    convention: str | None = None,
    at: Sequence[float] = (),
    label: str = "",
) -> FitResult:
    """Curves of loss (nats/token) over size, one per distinct `budget` (FLOPs), and the lines through their minima.

    curve: 'parabola' or 'cubic' (least squares on raw loss), or 'akima' (through the mean log loss of each size, for
    curves that are no parabolas). axis: 'params' finds N* over log N, and D* is budget / cost(N*), cost being
    flops/tokens of the rows (6 N without `flops`); 'tokens' finds D* over log D, and N* from the cost. Runs of one size
    (seeds) are averaged by weight. loss_se, loss_se_own: as in `fit_surface`.

    With fewer than two usable budgets there is no line: status 'refused', and `minima` says why.
    """
    for what, value, allowed in (("curve", curve, curves.CURVES), ("axis", axis, AXES)):
        if value not in allowed:
            raise unknown(what, value, allowed)
    points = as_points(
        params,
        tokens,
        loss,
        flops=flops,
        budget=budget,
        weights=weights,
        loss_se=loss_se,
        loss_se_own=loss_se_own,
        convention=convention,
    )
    cost = cost_of(points)
    groups = [points.at_budget(level) for level in points.budgets()]
    minima = tuple(_whole(minimum(g, curve=curve, axis=axis), axis, cost) for g in groups)
    usable = [m for m in minima if m.usable]
    blank = FitResult(
        law="isoflop",
        loss="mse",
        space=curves.SPACE[curve],
        delta=NAN,
        n=len(points),
        curve=curve,
        axis=axis,
        minima=minima,
        label=label,
        points=points,
        cost=cost,
        objective=sum(_squares(g, m, curve, axis) for g, m in zip(groups, minima, strict=True)),
    )
    if len(usable) < LEAST_BUDGETS:
        return _refused(blank, len(usable))
    return _with_lines(blank, points, usable, at)


def curve_of(result: FitResult, found: Minimum, num: int = 80) -> tuple[Array, Array]:
    """The fitted curve of one budget for a figure: N (num,) across the sizes tried, and its loss (num,)."""
    assert result.points is not None
    rows = result.points.at_budget(found.budget)
    x = along(rows, result.axis)
    grid = np.linspace(x.min(), x.max(), num)
    loss = _at(rows, found, result.curve, result.axis, grid)
    return np.exp(grid if result.axis == "params" else log_params(result.cost, np.log(found.budget) - grid)), loss


def log_params(cost: Cost, log_per_token: Array) -> Array:
    """log N whose cost per token is this: the inverse of `Cost.log_per_token`, by bisection."""
    if cost.is_6nd:
        return np.asarray(log_per_token - np.log(6.0), dtype=np.float64)
    low, high = log_per_token - REACH_NATS, log_per_token + REACH_NATS
    for _ in range(60):
        middle = (low + high) / 2
        above = cost.log_per_token(middle) > log_per_token
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.asarray((low + high) / 2, dtype=np.float64)


def lines(budgets: Array, logs: Array) -> Array:
    """Log-log least squares: logs of N*, D*, L* (R, budgets, 3) -> (N0, a, D0, b, L0, c), (R, 6)."""
    z = np.log(budgets)
    centred = z - z.mean()
    slope = np.einsum("b,rbk->rk", centred / (centred @ centred), logs)
    start = logs.mean(axis=1) - slope * z.mean()
    with np.errstate(over="ignore"):
        return np.stack([np.exp(start), slope], axis=2).reshape(len(logs), 6)


def _whole(found: Minimum, axis: str, cost: Cost) -> Minimum:
    """The minimum with both N and D."""
    if not found.usable:
        return found
    if axis == "params":
        per_token = np.exp(cost.log_per_token(np.log([found.N])))
        return replace(found, D=found.budget / float(per_token[0]))
    best = np.exp(log_params(cost, np.log([found.budget / found.D])))
    return replace(found, N=float(best[0]))


def _with_lines(blank: FitResult, points: Points, usable: list[Minimum], at: Sequence[float]) -> FitResult:
    fitted = _line(usable)
    warnings = (*_warnings(points, blank, usable), *reach_warnings("isoflop", at, usable[-1].budget))
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


def _warnings(points: Points, blank: FitResult, usable: Sequence[Minimum]) -> list[str]:
    warned = [f"left out: {m.detail}" for m in blank.minima if m.reason]
    spans = [float(np.ptp(along(points.at_budget(m.budget), blank.axis))) for m in usable]
    if blank.curve == "parabola" and np.median(spans) > np.log(WIDE):
        span = f"a factor of {np.exp(np.median(spans)):.0f}"
        biased = "the minima may be biased, less so with curve='cubic'"
        warned.append(f"the curves span {span} in size, and parabolas fit narrower ones: {biased}")
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


def _squares(points: Points, found: Minimum, curve: str, axis: str) -> float:
    """Sum of weighted squared residuals of one budget about its curve, in its space; 0 where there is none."""
    if not np.isfinite(found.centre):
        return 0.0
    fitted, loss = _at(points, found, curve, axis, along(points, axis)), points.loss
    if curves.SPACE[curve] == "log":
        fitted, loss = np.log(fitted), np.log(loss)
    return float(np.sum(points.weight * (loss - fitted) ** 2))


def _at(points: Points, found: Minimum, curve: str, axis: str, x: Array) -> Array:
    """The curve of one budget at x, log N or log D (m,)."""
    if curve == "akima":
        sizes, means = mean_losses(points, curve, axis)
        inside = np.clip(x, sizes[0], sizes[-1])
        return np.asarray(np.exp(curves.akima_at(sizes, means, inside)[0]), dtype=np.float64)
    return np.asarray(curves.value(np.array([found.coefficients]), (x - found.centre)[None])[0], dtype=np.float64)
