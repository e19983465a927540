"""resample: a FitResult -> the same with 95 % intervals, by refitting resampled points. Called by table and notebooks.

'pairs' draws the points again (clusters whole, isoflop within budgets); 'residuals' keeps the design and draws
residuals, the ends widened by Student's t: the one for few points; 'nested' draws one noise a cluster and one a point.
A replicate that has no fit counts as unbounded: where too many do, the interval is not a number and a warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit import optimum
from dlm.fit.draws import Draws, ends
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop import resample as isoflop_resample
from dlm.fit.optimum import LINE, at_compute
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult
from dlm.fit.surface import resample as surface_resample
from dlm.fit.surface.diagnose import EXPONENT_RANGE, ZERO
from dlm.fit.surface.noise import shared_se

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


METHODS = ("auto", "pairs", "residuals", "nested")


@np.errstate(all="ignore")  # replicates that overflow are counted as failed
def bootstrap(
    result: FitResult,
    *,
    replicates: int = 4000,
    seed: int = 0,
    method: str = "auto",
    level: float = 0.95,
    at: Sequence[float] | None = None,
) -> FitResult:
    """Intervals for the parameters, a, b, and N*, D*, L* at each C of the result (or of `at`). Same seed,
    same numbers.

    `auto` takes residuals for isoflop and for surfaces below 40 points, else pairs. Where points share a cluster it
    takes nested below 40 clusters (surfaces only), else draws clusters whole.
    """
    if method not in METHODS:
        raise unknown("bootstrap method", method, METHODS)
    if replicates < 100 or not 0 < level < 1:
        raise UserError(f"replicates is {replicates}, level {level}: give 100 or more, and a level between 0 and 1")
    if result.points is None or result.law == "envelope" or not (result.params or result.usable):
        return result
    if seed < 0:
        raise UserError(f"seed is {seed}: give a whole number, 0 or above")
    if result.surface is not None and len(np.unique(result.points.cluster)) == 1 < len(result.points):
        said = "no interval: all points are of one run or trunk, and nothing shows how another would differ"
        return replace(result, warnings=(*result.warnings, said), status="warned")
    rng = np.random.default_rng(seed)
    draw = isoflop_resample.draw if result.law == "isoflop" else surface_resample.draw
    draws = draw(result, result.points, replicates, method, rng)
    draws = _with_shared_noise(draws, result, result.points, rng)
    return with_intervals(result, draws, level, tuple(result.at) if at is None else at)


def _with_shared_noise(draws: Draws, result: FitResult, points: Points, rng: np.random.Generator) -> Draws:
    """The Monte Carlo error that all losses share moves E, or the whole line of L, and nothing else."""
    error = shared_se(points)
    if not error or not draws.rows.size:
        return draws
    rows, shift = draws.rows.copy(), error * rng.standard_normal(len(draws.rows))
    if result.surface is None:
        rows[:, LINE.index("L0")] *= np.exp(shift / np.median(points.loss))
    elif "E" not in result.fixed:
        rows[:, result.surface.params.index("E")] = np.maximum(rows[:, result.surface.params.index("E")] + shift, 0.0)
    return replace(draws, rows=rows)
