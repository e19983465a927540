"""Find the minimum of the loss at each budget, and the lines N*(C), D*(C) and L*(C) through these minima.

This is approach 2 of Hoffmann et al. (2203.15556). They fit parabolas in log N. This module can also fit cubics
or Akima curves, and can use log D instead of log N. A curve without an interior minimum is refused, and the reason is
given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import unknown
from dlm.fit import optimum
from dlm.fit.engine.newton import Norm
from dlm.fit.fitted import Allocation, Fitted, Minimum
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.minima import AXES, along, mean_losses, minimum
from dlm.fit.points import Array, Cost, Points, RunColumns, as_points, cost_of
from dlm.fit.result import FitResult

HOW = "slopes of the log-log lines through the isoFLOP minima; D* = C / cost(N*)"
LEAST_BUDGETS = 2
# Ratio of the largest to the smallest size above which parabolas get a warning. On noise-free Chinchilla curves, a
# ratio of 16 biases D* by 1.3 %, and a ratio of 64 by 2.9 %.
WIDE = 20.0


def fit_isoflop(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    budget: npt.ArrayLike,
    *,
    curve: str = "parabola",
    axis: str = "params",
    at: Sequence[float] = (),
    label: str = "",
    **columns: Unpack[RunColumns],
) -> FitResult:
    """Fit a curve of loss over size to the runs of each budget, and lines through the minima of these curves.

    Args:
        params: N of each run, (n,).
        tokens: D of each run, (n,).
        loss: L of each run, (n,), nats/token. Runs of equal size, such as seeds, are averaged by weight.
        budget: The FLOPs that each run aimed at, (n,); runs of equal budget form a curve.
        curve: 'parabola' or 'cubic' (least squares of the loss), or 'akima' (through the mean log loss of each size,
            for losses that no parabola describes).
        axis: 'params' finds N* over log N; D* is then the budget divided by the cost of a token at N*. 'tokens' finds
            D* over log D; N* then follows from the cost.
        at: The values of C at which to report the optimum, FLOPs.
        label: Name of the group of runs, shown in reports.
        **columns: Optional columns of the runs: flops, weights, loss_se, loss_se_own and convention, as in
            `fit_surface`. The cost of a token is C / D.

    Returns:
        The lines N* = N0 C^a, D* = D0 C^b and L* = L0 C^c. With fewer than two usable budgets there are no lines: the
        status is 'refused', and `minima` holds the reasons.

    Raises:
        UserError: For a column or an argument that is not allowed.
    """
    for what, value, allowed in (("curve", curve, curves.CURVES), ("axis", axis, AXES)):
        if value not in allowed:
            raise unknown(what, value, allowed)
    points = as_points(params, tokens, loss, budget=budget, **columns)
    result = replace(fit_groups(points, curve=curve, axis=axis), label=label)
    return optimum.with_optima(result, at) if result.params else result


def fit_groups(points: Points, *, curve: str = "parabola", axis: str = "params") -> FitResult:
    """Fit curves and lines to checked points with budgets; the result has no optima."""
    cost = cost_of(points)
    groups = [points.at_budget(level) for level in points.budgets()]
    minima = tuple(minimum(g, cost, curve=curve, axis=axis) for g in groups)
    result = FitResult(
        law="isoflop",
        how=Norm(norm="mse", space=curves.SPACE[curve]),
        n=len(points),
        curve=curve,
        axis=axis,
        minima=minima,
        points=points,
        cost=cost,
        value=sum(_squares(g, m, curve, axis) for g, m in zip(groups, minima, strict=True)),
    )
    return _with_line(result)


def without(result: FitResult, budgets: Collection[float], why: str) -> FitResult:
    """The fit with lines that leave out the minima of some budgets (FLOPs), for the reason `why`."""
    minima = tuple(
        replace(m, reason="not_bounded", why=why, detail=f"budget {text.flops(m.budget)}: {why}")
        if m.budget in budgets
        else m
        for m in result.minima
    )
    return _with_line(replace(result, minima=minima))


def _with_line(result: FitResult) -> FitResult:
    """The fit with lines through its usable minima, or refused if there are too few."""
    points, usable, curve, axis = result.points, result.usable, result.curve, result.axis
    assert points is not None
    refused = [m.detail for m in result.minima if m.reason]
    if len(usable) < LEAST_BUDGETS:
        has = f"there {'is' if len(usable) == 1 else 'are'} {len(usable) or 'none'}"
        why = f"no law: a line needs {LEAST_BUDGETS} budgets with an interior minimum, and {has}"
        none = Allocation(how="refused: no line")
        return replace(result, status="refused", warnings=(why, *refused), allocation=none)
    line = line_through(usable)
    share = Allocation(a=line["a"], b=line["b"], how=HOW)
    result = replace(result, params=line, allocation=share, holdout=_holdout(usable))
    left_out = [f"left out: {detail}" for detail in refused]
    return optimum.with_warnings(result, [*left_out, *_warnings(points, usable, curve, axis)])


def curve_of(result: Fitted, found: Minimum, num: int = 80) -> tuple[Array, Array]:
    """The fitted curve of one budget, for a figure: N across the sizes tried, (num,), and the loss there, (num,)."""
    assert result.points is not None
    rows = result.points.at_budget(found.budget)
    x = along(rows, result.axis)
    grid = np.linspace(x.min(), x.max(), num)
    loss = _at(rows, found, result.curve, result.axis, grid)
    return np.exp(grid if result.axis == "params" else result.cost.log_size(np.log(found.budget) - grid)), loss


def curve_losses(result: Fitted, found: Minimum) -> Array:
    """The loss on the fitted curve of one budget at the size of each of its runs, in their order, (m,)."""
    assert result.points is not None
    rows = result.points.at_budget(found.budget)
    return _at(rows, found, result.curve, result.axis, along(rows, result.axis))


def lines(budgets: Array, logs: Array) -> Array:
    """Fit log-log lines by least squares: logs of N*, D* and L*, (R, budgets, 3) -> (N0, a, D0, b, L0, c), (R, 6)."""
    z = np.log(budgets)
    centred = z - z.mean()
    slope = np.einsum("b,rbk->rk", centred / (centred @ centred), logs)
    start = logs.mean(axis=1) - slope * z.mean()
    with np.errstate(over="ignore"):
        return np.stack([np.exp(start), slope], axis=2).reshape(len(logs), 6)


def line_through(minima: Sequence[Minimum]) -> dict[str, float]:
    """Fit lines through minima, and return their parameters by name."""
    logs = np.log([[m.N, m.D, m.L] for m in minima])
    fitted = lines(np.array([m.budget for m in minima]), logs[None])[0].tolist()
    return dict(zip(optimum.LINE, fitted, strict=True))


def _warnings(points: Points, usable: Sequence[Minimum], curve: str, axis: str) -> list[str]:
    warned = []
    spans = [float(np.ptp(along(points.at_budget(m.budget), axis))) for m in usable]
    if curve == "parabola" and np.median(spans) > np.log(WIDE):
        span = f"a factor of {np.exp(np.median(spans)):.0f}"
        biased = "the minima may be biased, less so with curve='cubic'"
        warned.append(f"the curves span {span} in size, and parabolas fit narrower ones: {biased}")
    if len(usable) == LEAST_BUDGETS:
        warned.append("two budgets only: the lines pass through both exactly, and nothing checks their straightness")
    return warned


def _holdout(usable: Sequence[Minimum]) -> dict[str, dict[str, float]]:
    """Relative errors, at the top budget, of lines fitted without the top one and two minima (leave-future-out)."""
    found = {}
    for k in (1, 2):
        if len(usable) - k < LEAST_BUDGETS:
            break
        rows = optimum.as_rows(None, line_through(usable[:-k]))
        top = usable[-1]
        n, d, loss = optimum.best(None, rows, top.budget, Cost())[0].tolist()
        errors = {"N_error": n / top.N - 1, "D_error": d / top.D - 1, "L_error": loss / top.L - 1}
        found[f"without_top_{k}"] = {"from_flops": top.budget, **errors}
    return found


def _squares(points: Points, found: Minimum, curve: str, axis: str) -> float:
    """The weighted sum of squared residuals of one budget, in the space of its curve; 0 if it has no curve."""
    if not np.isfinite(found.centre):
        return 0.0
    fitted, loss = _at(points, found, curve, axis, along(points, axis)), points.loss
    if curves.SPACE[curve] == "log":
        fitted, loss = np.log(fitted), np.log(loss)
    return float(np.sum(points.weight * (loss - fitted) ** 2))


def _at(points: Points, found: Minimum, curve: str, axis: str, x: Array) -> Array:
    """The loss on the curve of one budget, (m,), at each x (log N or log D), (m,)."""
    if curve == "akima":
        sizes, means = mean_losses(points, curve, axis)
        inside = np.clip(x, sizes[0], sizes[-1])
        return np.asarray(np.exp(curves.akima_at(sizes, means, inside)[0]), dtype=np.float64)
    return np.asarray(curves.value(np.array([found.coefficients]), (x - found.centre)[None])[0], dtype=np.float64)
