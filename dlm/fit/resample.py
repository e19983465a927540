"""resample: a FitResult -> the same with 95 % intervals, by refitting resampled points. Called by table and notebooks.

'pairs' draws the points again (clusters whole, isoflop within budgets); 'residuals' keeps the design and draws
residuals, the ends widened by Student's t: the one for few points; 'nested' draws one noise a cluster and one a point.
A replicate that has no fit counts as unbounded: where too many do, the interval is not a number and a warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dlm.errors import UserError, unknown
from dlm.fit import isoflop_draws, surface_draws
from dlm.fit.draws import Draws
from dlm.fit.intervals import with_intervals
from dlm.fit.noise import shared_se
from dlm.fit.optimum import LINE
from dlm.fit.points import Points
from dlm.fit.result import FitResult

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
    draw = isoflop_draws.draw if result.law == "isoflop" else surface_draws.draw
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
