"""intervals: a FitResult and its bootstrap draws -> the FitResult with intervals and their reservations.
Called by resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dlm.fit import optimum, text
from dlm.fit.diagnose import EXPONENT_RANGE, ZERO
from dlm.fit.draws import Draws
from dlm.fit.points import NAN, Array, Interval
from dlm.fit.result import FitResult, Minimum, Optimum
from dlm.fit.surface import TOP, WITHHELD_FORM, WITHHELD_LINE

WITHHELD_FAR = "beyond the reach of these runs"
FEW_FAILED = 0.005  # of the replicates: not worth a warning
LINE_SCALES = ("N0", "D0", "L0")  # their intervals are taken in logs


def with_intervals(result: FitResult, draws: Draws, level: float, at: Sequence[float]) -> FitResult:
    """The result with intervals for its parameters, exponents, minima and optima, and what to beware of."""
    assert result.points is not None
    if not result.params:  # minima, but too few for a line
        return replace(result, minima=_minima(result.minima, draws, level))
    span = optimum.span_of(result.points)
    result = replace(result, draws=draws.rows, dof=draws.dof, interval_method=draws.method)
    result = replace(result, failed=int(np.sum(~np.isfinite(draws.rows).all(axis=1))))
    law = result.surface
    slopes = optimum.exponents(law, draws.rows, span, result.cost)
    scales = LINE_SCALES if law is None else law.scales
    ci = {
        name: ends(result.params[name], draws.rows[:, k], draws.dof, level, log=name in scales)
        for k, name in enumerate(optimum.names(law))
        if name not in result.fixed
    }
    share = (result.allocation.a, result.allocation.b)
    ci |= {name: ends(share[k], slopes[:, k], draws.dof, level) for k, name in enumerate("ab")}
    best = {float(c): at_compute(result, float(c), level) for c in at}
    minima = _minima(result.minima, draws, level)
    result = replace(result, ci=ci, at=best, minima=minima)
    warnings = tuple(dict.fromkeys((*result.warnings, *_warnings(result, level))))
    return replace(result, warnings=warnings, status="warned" if warnings else result.status)


def ends(point: float, values: Array, dof: int, level: float, *, log: bool = False) -> Interval:
    """Percentiles of the replicates, stretched about the fit by t/z for residuals. Those that failed could lie at
    either end, and count at both; NaN if they are too many.
    """
    tail = (1 - level) / 2
    good = values[np.isfinite(values)]
    if len(good) < (1 - tail) * len(values) or not np.isfinite(point):
        return (NAN, NAN)
    good, middle = (np.log(np.maximum(good, 1e-300)), np.log(point)) if log else (good, point)
    beyond = max(tail * len(values) - (len(values) - len(good)), 0.0) / len(good)
    low, high = np.quantile(good, [beyond, 1 - beyond])
    k = stretch(dof, tail)
    pair = (min(middle, middle + k * (low - middle)), max(middle, middle + k * (high - middle)))
    with np.errstate(over="ignore"):
        return (float(np.exp(pair[0])), float(np.exp(pair[1]))) if log else (float(pair[0]), float(pair[1]))


def stretch(dof: int, tail: float) -> float:
    """Student's quantile over the normal one: 1 for dof 0, which means that percentiles are taken as they are."""
    if dof <= 0:
        return 1.0
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(dof, 1 - tail) / ndtri(1 - tail))


def at_compute(result: FitResult, flops: float, level: float, *, far: bool = False) -> Optimum:
    """The optimum at C with the intervals that take the law's form for granted.

    So that of L is withheld beyond the runs unless `far`; `gate.judge` gives one that holds further.
    """
    assert result.points is not None
    point = optimum.best(result.surface, optimum.as_rows(result.surface, result.params), flops, result.cost)[0].tolist()
    best = Optimum(N=point[0], D=point[1], L=point[2], reach=flops / top_of(result))
    if result.draws is None:
        return best
    spread = optimum.best(result.surface, result.draws, flops, result.cost)
    ci = {k: ends(point[j], spread[:, j], result.dof, level, log=True) for j, k in enumerate("NDL")}
    if best.reach > TOP and not far:
        ci["L"] = (NAN, NAN)
        best = replace(best, withheld=WITHHELD_LINE if result.surface is None else WITHHELD_FORM)
    ratio = spread[:, 1] / spread[:, 0]
    ci["tokens_per_param"] = ends(best.tokens_per_param, ratio, result.dof, level, log=True)
    return replace(best, ci=ci, regret=regret(result, flops, best.N, ci["N"]))


def top_of(result: FitResult) -> float:
    """The highest C that the result rests on, FLOPs."""
    assert result.points is not None
    return max((m.budget for m in result.usable), default=float(result.points.flops.max()))


def regret(result: FitResult, flops: float, best: float, ends_n: Interval) -> float:
    """The loss given away, at most, by training any size inside the interval of N* at C FLOPs."""
    log_n = np.log([best, *ends_n])
    if result.surface is not None:
        log_d = np.log(flops) - result.cost.log_per_token(log_n)
        row = optimum.as_rows(result.surface, result.params)
        loss = result.surface.predict(row, log_n[None], log_d[None])[0]
        return float((loss[1:] - loss[0]).max())
    curvature = float(np.median([m.coefficients[2] for m in result.minima if m.usable]))
    return float(curvature * ((log_n[1:] - log_n[0]) ** 2).max())


def _minima(minima: tuple[Minimum, ...], draws: Draws, level: float) -> tuple[Minimum, ...]:
    if draws.vertices is None:
        return minima
    usable = iter(np.exp(draws.vertices).transpose(1, 0, 2))
    return tuple(_with_ci(m, next(usable), draws, level) if m.usable else m for m in minima)


def _with_ci(minimum: Minimum, values: Array, draws: Draws, level: float) -> Minimum:
    ci = {k: ends(getattr(minimum, k), values[:, j], draws.dof, level, log=True) for j, k in enumerate("NDL")}
    return replace(minimum, ci=ci)


def _warnings(result: FitResult, level: float) -> list[str]:
    assert result.draws is not None
    share, warned = result.failed / len(result.draws), []
    if share > FEW_FAILED:
        warned.append(f"{result.failed} of {len(result.draws)} resampled fits found no law")
    if share > (1 - level) / 2:
        warned[0] += ": the data do not bound it, so no interval is given"
    elif result.surface is not None:
        warned += _unseen(result)
    warned += [
        f"budget {text.flops(m.budget)}: the place of the minimum is not bounded by its points"
        for m in result.minima
        if _open(m)
    ]
    wide = [c for c, o in result.at.items() if o.ci["N"][1] > 10 * o.ci["N"][0]]
    if wide:
        warned.append(
            f"at C = {text.flops(wide[-1])} the interval of N* spans over a factor of 10: too few or too noisy runs"
        )
    return warned


def _open(minimum: Minimum) -> bool:
    return minimum.usable and not np.isfinite(minimum.ci["N"]).all()


def _unseen(result: FitResult) -> list[str]:
    """Parameters whose interval reaches a bound."""
    assert result.points is not None
    warned = []
    assert result.surface is not None
    for name in result.surface.exponents:
        if name in result.fixed:
            continue
        low, high = result.ci[name]
        if low <= EXPONENT_RANGE[0] or high >= EXPONENT_RANGE[1]:
            warned.append(f"{name} is not determined: its interval ({low:.2g} to {high:.2g}) reaches what no law has")
    if "E" not in result.fixed and result.ci["E"][0] < ZERO * result.points.loss.min():
        warned.append("E is not determined: its interval reaches zero, so the loss far beyond these runs is not known")
    return warned
