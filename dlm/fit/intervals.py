"""intervals: a FitResult and its bootstrap draws -> the FitResult with intervals and their reservations.
Called by resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlm.fit import optimum
from dlm.fit.points import Array
from dlm.fit.result import FitResult, Interval, Minimum, Optimum
from dlm.fit.surface import EXPONENT_RANGE, ZERO

NATURAL_LOGS = ("A", "B", "N0", "D0", "L0")  # parameters that scale, so their intervals are taken in logs


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """What a bootstrap produced: parameter rows (R, k), per-budget vertices (R, budgets, 3), and how to read
    them.
    """

    rows: Array
    vertices: Array | None
    method: str
    dof: int  # for Student's t; 0 means percentiles as they are


def with_intervals(result: FitResult, draws: Draws, level: float, at: Sequence[float]) -> FitResult:
    """The result with intervals for its parameters, exponents, minima and optima, and what to beware of."""
    assert result.points is not None
    span = optimum.span_of(result.points)
    names = optimum.PARAMS[result.law]
    middle, rows = optimum.as_rows(result.law, result.params), draws.rows
    ci = {name: ends(middle[0, k], rows[:, k], draws, level, log=name in NATURAL_LOGS) for k, name in enumerate(names)}
    slopes = optimum.exponents(result.law, rows, span, result.cost)
    point = (result.allocation.a, result.allocation.b)
    ci |= {name: ends(point[k], slopes[:, k], draws, level) for k, name in enumerate("ab")}
    result = replace(result, ci=ci, draws=rows, interval_method=draws.method)
    best = {float(c): _optimum(result, draws, float(c), level) for c in at}
    minima = _minima(result.minima, draws, level)
    warnings = dict.fromkeys((*result.warnings, *_warnings(result, draws, best, minima, level)))
    status = "warned" if warnings else result.status
    return replace(result, at=best, minima=minima, warnings=tuple(warnings), status=status)


def ends(point: float, values: Array, draws: Draws, level: float, *, log: bool = False) -> Interval:
    """Percentiles of the finite replicates, stretched about the fit by t/z for residuals; NaN where too many
    failed.
    """
    tail = (1 - level) / 2
    good = values[np.isfinite(values)]
    if len(good) < (1 - tail) * len(values) or not np.isfinite(point):
        return (float("nan"), float("nan"))
    good, middle = (np.log(np.maximum(good, 1e-300)), np.log(point)) if log else (good, point)
    low, high = np.quantile(good, [tail, 1 - tail])
    k = _stretch(draws.dof, tail)
    pair = (min(middle, middle + k * (low - middle)), max(middle, middle + k * (high - middle)))
    with np.errstate(over="ignore"):
        return (float(np.exp(pair[0])), float(np.exp(pair[1]))) if log else (float(pair[0]), float(pair[1]))


def _stretch(dof: int, tail: float) -> float:
    if dof <= 0:
        return 1.0
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(dof, 1 - tail) / ndtri(1 - tail))


def _optimum(result: FitResult, draws: Draws, flops: float, level: float) -> Optimum:
    assert result.points is not None
    n, d, loss = optimum.best(result.law, optimum.as_rows(result.law, result.params), flops, result.cost)[0].tolist()
    spread = optimum.best(result.law, draws.rows, flops, result.cost)
    top = max((m.budget for m in result.minima if m.usable), default=float(result.points.flops.max()))
    reach = flops / top
    ci = {
        k: ends(p, spread[:, j], draws, level, log=True)
        for j, (k, p) in enumerate(zip("NDL", (n, d, loss), strict=True))
    }
    if reach > optimum.REACH[result.law]:
        ci["L"] = (float("nan"), float("nan"))
    return Optimum(N=n, D=d, L=loss, ci=ci, regret=_regret(result, flops, n, ci["N"]), reach=reach)


def _regret(result: FitResult, flops: float, best: float, ends_n: Interval) -> float:
    """The loss given away, at most, by training any size inside the interval of N* at C FLOPs."""
    log_n = np.log([best, *ends_n])
    if result.law == "chinchilla":
        log_d = np.log(flops) - result.cost.log_per_token(log_n)
        row = optimum.as_rows(result.law, result.params)
        loss = optimum.surface(row, log_n[None], log_d[None])[0]
        return float((loss[1:] - loss[0]).max())
    curvature = float(np.median([m.coefficients[2] for m in result.minima if m.usable]))
    return float(curvature * ((log_n[1:] - log_n[0]) ** 2).max())


def _minima(minima: tuple[Minimum, ...], draws: Draws, level: float) -> tuple[Minimum, ...]:
    if draws.vertices is None:
        return minima
    usable = iter(np.exp(draws.vertices).transpose(1, 0, 2))
    return tuple(_with_ci(m, next(usable), draws, level) if m.usable else m for m in minima)


def _with_ci(minimum: Minimum, values: Array, draws: Draws, level: float) -> Minimum:
    ci = {k: ends(getattr(minimum, k), values[:, j], draws, level, log=True) for j, k in enumerate("NDL")}
    return replace(minimum, ci=ci)


def _warnings(
    result: FitResult, draws: Draws, best: dict[float, Optimum], minima: tuple[Minimum, ...], level: float
) -> list[str]:
    failed = int(np.sum(~np.isfinite(draws.rows).all(axis=1)))
    warned = [f"{failed} of {len(draws.rows)} resampled fits found no law"] if failed else []
    if failed > (1 - level) / 2 * len(draws.rows):
        warned[0] += ": the data do not bound it, so no interval is given"
    elif result.law == "chinchilla":
        warned += _unseen(result)
    warned += [
        f"budget {m.budget:.3g}: the place of the minimum is not bounded by its points" for m in minima if _open(m)
    ]
    wide = [c for c, o in best.items() if o.ci["N"][1] > 10 * o.ci["N"][0]]
    if wide:
        warned.append(f"at C = {wide[-1]:.3g} the interval of N* spans over a factor of 10: too few or too noisy runs")
    return warned


def _open(minimum: Minimum) -> bool:
    return minimum.usable and not np.isfinite(minimum.ci["N"]).all()


def _unseen(result: FitResult) -> list[str]:
    """Parameters whose interval reaches a bound."""
    assert result.points is not None
    warned = []
    for name in ("alpha", "beta"):
        low, high = result.ci[name]
        if low <= EXPONENT_RANGE[0] or high >= EXPONENT_RANGE[1]:
            warned.append(f"{name} is not determined: its interval ({low:.2g} to {high:.2g}) reaches what no law has")
    if result.ci["E"][0] < ZERO * result.points.loss.min():
        warned.append("E is not determined: its interval reaches zero, so the loss far beyond these runs is not known")
    return warned
