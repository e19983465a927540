"""Add intervals to a fitted law, by refitting it to resampled points.

Methods: 'pairs' resamples the points, as whole clusters, and isoFLOP points within each budget. 'residuals' keeps N and
D, resamples residuals, and widens the interval by Student's t; it suits few points. 'nested' draws one noise term per
cluster and one per point. A replicate without a fit counts as unbounded: if there are too many of these, the interval
is NaN, and a warning is given.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit import optimum
from dlm.fit.combined import doubt
from dlm.fit.combined import resample as combined_resample
from dlm.fit.combined.fit import with_minima
from dlm.fit.draws import Draws, ends
from dlm.fit.fitted import Fitted, Minimum
from dlm.fit.isoflop import resample as isoflop_resample
from dlm.fit.isoflop.fit import LEAST_BUDGETS, without
from dlm.fit.points import UNBOUNDED, Array, Interval
from dlm.fit.result import FitResult
from dlm.fit.surface import resample as surface_resample
from dlm.fit.surface.diagnose import EXPONENT_RANGE, ZERO
from dlm.fit.surface.noise import shared_se

METHODS = ("auto", "pairs", "residuals", "nested")
LEAST_REPLICATES = 100
FEW_FAILED = 0.005  # largest share of failed replicates that gives no warning
WIDE = 10.0  # ratio of the upper to the lower end of an interval of N* above which a warning is given
LINE_SCALES = ("N0", "D0", "L0")  # parameters of lines whose intervals are taken in logs


@np.errstate(all="ignore")  # replicates that overflow are counted as failed
def bootstrap(
    result: FitResult,
    *,
    replicates: int = 4000,
    seed: int = 0,
    method: str = "auto",
    level: float = 0.95,
) -> FitResult:
    """Add intervals for the parameters, for a and b, and for N*, D* and L*. The same seed gives the same numbers.

    Args:
        result: A fit. An envelope, or a fit without a law or minima, is returned unchanged.
        replicates: Number of samples to refit, 100 or more.
        seed: Seed of the random numbers.
        method: 'pairs', 'residuals', 'nested' or 'auto'. 'auto' takes 'residuals' for isoFLOP curves and for surfaces
            on fewer than 40 points, else 'pairs'. If points share a cluster, it takes 'nested' for surfaces on fewer
            than 40 clusters, else 'pairs'.
        level: Nominal coverage of the intervals.

    Raises:
        UserError: For an argument that is not allowed, or a method that these points do not permit.
    """
    if method not in METHODS:
        raise unknown("bootstrap method", method, METHODS)
    if replicates < LEAST_REPLICATES or not 0 < level < 1:
        raise UserError(
            f"replicates is {replicates}, level {level}: give {LEAST_REPLICATES} or more, and a level between 0 and 1"
        )
    if result.points is None or result.law == "envelope" or not (result.params or result.usable):
        return result
    if seed < 0:
        raise UserError(f"seed is {seed}: give a whole number, 0 or above")
    if result.surface is not None and result.points.num_clusters == 1 < len(result.points):
        said = "no interval: all points are of one run or trunk, and nothing shows how another would differ"
        return optimum.with_warnings(result, [said])
    rng = np.random.default_rng(seed)
    if result.combination is not None:
        found = _combined(result, combined_resample.draw(result, replicates, method, rng), level, rng)
        return _with_doubts(found, method, level, rng)
    room = isoflop_resample if result.surface is None else surface_resample
    draws = room.draw(result, replicates, method, rng)
    lost = _unbounded(result, draws)
    if lost and len(result.usable) - len(lost) >= LEAST_BUDGETS:
        bounded = without(result, lost, "resampled runs do not bound the place of its minimum")
        return bootstrap(bounded, replicates=replicates, seed=seed, method=method, level=level)
    rows = _shifted(draws.rows, result, _shared_errors(result, len(draws.rows), rng))
    return _with_intervals(result, replace(draws, rows=rows), level)


def _combined(
    result: FitResult, drawn: combined_resample.Resampled, level: float, rng: np.random.Generator
) -> FitResult:
    """A combined law with the intervals of its resampled parts, line and floor law."""
    assert result.combination is not None
    shift, floor = _shared_errors(result, len(drawn.parts.rows), rng), result.combination.floor
    if floor is not None and drawn.lowest is not None:
        floor = replace(floor, draws=drawn.lowest + shift[:, None])
    result = with_minima(result, _bounded(result, drawn.line, drawn.parts.dof, level), floor)
    rows = _shifted(drawn.parts.rows, result, shift)
    return _with_intervals(result, replace(drawn.parts, rows=rows), level)


def _with_doubts(result: FitResult, method: str, level: float, rng: np.random.Generator) -> FitResult:
    """A combined law whose intervals also cover what the runs below the top budgets predict, if these are in doubt."""
    found = []
    for many, lower, above in doubt.lower_laws(result):
        if not doubt.may_be_doubted(lower, above):
            continue
        try:
            drawn = combined_resample.draw(lower, doubt.num_draws(lower), method, rng)
        except UserError:  # there are too few runs below for this method, so they cannot contradict the others
            continue
        found += doubt.doubts(many, _combined(lower, drawn, level, rng), above)
    if not found:
        return result
    assert result.combination is not None
    result = replace(result, combination=replace(result.combination, doubts=tuple(found)))
    return replace(result, at=optimum.optima(result, result.at, level=level))


def _unbounded(result: Fitted, draws: Draws) -> list[float]:
    """The budgets of isoFLOP minima that too many draws do not have, FLOPs."""
    if draws.vertices is None:
        return []
    return [
        m.budget for m, place in zip(result.usable, draws.vertices[:, :, 0].T, strict=True) if np.isnan(place).any()
    ]


def _bounded(result: Fitted, rows: Array | None, dof: int, level: float) -> Fitted | None:
    """The isoFLOP line with its draws; None if they do not bound N* at the highest C of the runs."""
    assert result.combination is not None and result.points is not None
    if rows is None or result.combination.line is None:
        return None
    line = replace(result.combination.line, draws=rows, dof=dof)
    low, high = optimum.own_optimum(line, result.points.top_flops, level).ci["N"]
    return line if high <= WIDE * low else None


def _shared_errors(result: Fitted, count: int, rng: np.random.Generator) -> Array:
    """Draws of the Monte Carlo error that all losses share, nats/token, (count,)."""
    assert result.points is not None
    error = shared_se(result.points)
    return error * rng.standard_normal(count) if error else np.zeros(count)


def _shifted(rows: Array, result: Fitted, shift: Array) -> Array:
    """Shift E, or the whole line of L, by `shift`, (R,); no other parameter changes."""
    assert result.points is not None
    if not shift.any() or not rows.size:
        return rows
    rows = rows.copy()
    if result.surface is None:
        rows[:, optimum.LINE.index("L0")] *= np.exp(shift / np.median(result.points.loss))
    elif "E" not in result.fixed:
        floors = [k for k, name in enumerate(result.surface.params) if name.rpartition(".")[2] == "E"]
        rows[:, floors] = np.maximum(rows[:, floors] + shift[:, None], 0.0)
    return rows


def _with_intervals(result: FitResult, draws: Draws, level: float) -> FitResult:
    """The result with intervals for its parameters, exponents, minima and optima, and with warnings about them.

    A verdict that rests on earlier intervals is removed.
    """
    result = replace(result, minima=_minima(result.minima, draws, level))
    if not result.params:  # there are minima, but too few for a line
        return result
    law = result.surface
    found = np.isfinite(draws.rows).all(axis=1) if law is None else law.found(draws.rows)
    failed = int(np.sum(~found))
    result = replace(result, draws=draws.rows, dof=draws.dof, interval_method=draws.method, failed=failed, verdict=None)
    best = optimum.optima(result, result.at, level=level)
    result = replace(result, ci=_parameters(result, draws, level), at=best)
    return optimum.with_warnings(result, _warnings(result, level))


def _parameters(result: Fitted, draws: Draws, level: float) -> dict[str, Interval]:
    """Intervals of the free parameters, and of a and b."""
    assert result.points is not None
    law = result.surface
    scales = LINE_SCALES if law is None else law.scales
    slopes = optimum.exponents(law, draws.rows, optimum.span_of(result.points), result.cost)
    line, apart = None if result.combination is None else result.combination.line, np.zeros(2)
    if line is not None and line.draws is not None:
        slopes = (slopes + line.draws[:, [1, 3]]) / 2
        own, other = result.allocation, line.allocation
        apart = np.abs([own.a - other.a, own.b - other.b])  # half of the difference, because `own` is the mean
    ci = {
        name: ends(result.params[name], draws.rows[:, k], draws.dof, level, log=name in scales)
        for k, name in enumerate(optimum.names(law))
        if name not in result.fixed
    }
    ci |= dict.fromkeys(result.at_bound, UNBOUNDED)
    for k, name in enumerate("ab"):
        value = getattr(result.allocation, name)
        low, high = ends(value, slopes[:, k], draws.dof, level)
        ci[name] = (value - float(np.hypot(value - low, apart[k])), value + float(np.hypot(high - value, apart[k])))
    return ci


def _minima(minima: tuple[Minimum, ...], draws: Draws, level: float) -> tuple[Minimum, ...]:
    if draws.vertices is None:
        return minima
    usable = iter(np.exp(draws.vertices).transpose(1, 0, 2))
    return tuple(_with_ci(m, next(usable), draws, level) if m.usable else m for m in minima)


def _with_ci(minimum: Minimum, values: Array, draws: Draws, level: float) -> Minimum:
    ci = {k: ends(getattr(minimum, k), values[:, j], draws.dof, level, log=True) for j, k in enumerate("NDL")}
    return replace(minimum, ci=ci)


def _warnings(result: Fitted, level: float) -> list[str]:
    assert result.draws is not None
    share, warned = result.failed / len(result.draws), []
    if share > FEW_FAILED:
        warned.append(f"{result.failed} of {len(result.draws)} resampled fits found no law")
    if share > (1 - level) / 2:
        warned[0] += ": the data do not bound it, so no interval is given"
    elif result.surface is not None and result.combination is None:
        warned += _undetermined(result)
    warned += [
        f"budget {text.flops(m.budget)}: the place of the minimum is not bounded by its points"
        for m in result.usable
        if not np.isfinite(m.ci["N"]).all()
    ]
    wide = [c for c, o in result.at.items() if o.ci["N"][1] > WIDE * o.ci["N"][0]]
    if wide:
        warned.append(
            f"at C = {text.flops(wide[-1])} the interval of N* spans over a factor of 10: too few or too noisy runs"
        )
    return warned


def _undetermined(result: Fitted) -> list[str]:
    """Warnings for parameters whose intervals reach implausible values."""
    assert result.surface is not None and result.points is not None
    warned = []
    for name in result.surface.exponents:
        low, high = result.ci.get(name, (1.0, 1.0))
        if low <= EXPONENT_RANGE[0] or high >= EXPONENT_RANGE[1]:
            warned.append(f"{name} is not determined: its interval ({low:.2g} to {high:.2g}) reaches what no law has")
    if "E" not in result.fixed and result.ci["E"][0] < ZERO * result.points.loss.min():
        warned.append("E is not determined: its interval reaches zero, so the loss far beyond these runs is not known")
    return warned
