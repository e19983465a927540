"""resample: a FitResult -> the same with 95 % intervals, by refitting resampled points.
Called by table and notebooks.

'pairs' draws the points again (clusters whole, isoflop within budgets); 'residuals' keeps the design, draws
leverage-corrected residuals, its ends widened by Student's t: the one for few points. A replicate that has no
fit counts as unbounded: where too many do, the interval is not a number and a warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dlm.errors import UserError, unknown
from dlm.fit import parabola, scan, solver
from dlm.fit.intervals import Draws, with_intervals
from dlm.fit.isoflop import lines
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult, Minimum
from dlm.fit.surface import NUM_PARAMS

METHODS = ("auto", "pairs", "residuals")
FEW_SURFACE, FEW_PER_BUDGET = 40, 10  # below, 'auto' resamples residuals
NOWHERE_NATS = 50.0  # a vertex this far from the sizes tried is none


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

    `auto` takes residuals below 40 points (surface) or 10 a budget (isoflop), else pairs; repeated clusters
    need pairs.
    """
    if method not in METHODS:
        raise unknown("bootstrap method", method, METHODS)
    if replicates < 100 or not 0 < level < 1:
        raise UserError(f"replicates is {replicates}, level {level}: give 100 or more, and a level between 0 and 1")
    if result.points is None or result.law == "envelope" or not (result.params or _usable(result)):
        return result
    rng = np.random.default_rng(seed)
    draw = _draw_surface if result.law == "chinchilla" else _draw_isoflop
    draws = draw(result, result.points, replicates, method, rng)
    return with_intervals(result, draws, level, tuple(result.at) if at is None else at)


def _draw_surface(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> Draws:
    problem = solver.problem_of(
        points, space=result.space, norm=result.loss, delta=np.nan_to_num(result.delta, nan=1e-3)
    )
    theta = _theta(problem, result)
    fitted, target = solver.predict(problem, theta)[0], solver.target_of(problem, points.loss)
    residual, dof = target - fitted, len(points) - NUM_PARAMS
    if _pairs(method, points, len(points) < FEW_SURFACE):
        weight, targets, method, dof = _cluster_counts(points, replicates, rng), target[None], "pairs", 0
    else:
        weight, method = points.weight[None], "residuals"
        scaled = residual * np.sqrt(points.weight * len(points) / dof)
        drawn = _pick(scaled - scaled.mean(), replicates, rng)
        targets = fitted + drawn / np.sqrt(np.maximum(points.weight, 1e-300))
    found, done = _refit(problem, theta, residual, targets, weight)
    rows = solver.natural(problem, found)
    failed = np.logical_not(np.logical_and(done, np.isfinite(rows).all(axis=1)))
    rows[failed] = np.nan
    return Draws(rows=rows, vertices=None, method=method, dof=dof)


def _refit(
    problem: solver.Problem, theta: Array, residual: Array, targets: Array, weight: Array
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Newton from the better of each replicate's own scan (outliers held down) and the fit itself."""
    loss = np.exp(targets) if problem.space == "log" else targets
    tame = 1.0 if problem.norm == "mse" else 1.0 / np.maximum(np.abs(residual), problem.delta)
    begin, usable = scan.starts(problem, loss, weight * tame)
    own, common = (solver.value(problem, start, targets, weight) for start in (begin, theta))
    begin = np.where((usable & (own < common))[:, None], begin, theta)
    found, _, done = solver.minimise(problem, begin, targets, weight)
    return found, done


def _theta(problem: solver.Problem, result: FitResult) -> Array:
    p = result.params
    logs = np.log([p["A"], p["B"], p["E"]])
    row = [logs[0] - p["alpha"] * problem.centre[0], p["alpha"]]
    return np.array([[*row, logs[1] - p["beta"] * problem.centre[1], p["beta"], logs[2]]])


def _usable(result: FitResult) -> list[Minimum]:
    return [m for m in result.minima if m.usable]


def _draw_isoflop(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> Draws:
    usable = _usable(result)
    groups = [points.at_budget(m.budget) for m in usable]
    few = min(len(g) for g in groups) < FEW_PER_BUDGET
    pairs = _pairs(method, points, few)
    pool = np.concatenate([_residuals(g, m) for g, m in zip(groups, usable, strict=True)])
    vertices = np.stack(
        [_vertices(g, m, None if pairs else pool, replicates, rng) for g, m in zip(groups, usable, strict=True)],
        axis=1,
    )
    log_n, loss = vertices[:, :, 0], vertices[:, :, 1]
    budgets = np.array([m.budget for m in usable])
    log_d = np.log(budgets) - result.cost.log_per_token(log_n)
    with np.errstate(invalid="ignore"):
        logs = np.stack([log_n, log_d, np.log(loss)], axis=2)
    dof = 0 if pairs else len(pool) - 3 * len(usable)
    rows = lines(budgets, logs) if result.params else np.zeros((replicates, 0))
    return Draws(rows=rows, vertices=logs, method="pairs" if pairs else "residuals", dof=dof)


def _vertices(group: Points, minimum: Minimum, pool: Array | None, replicates: int, rng: np.random.Generator) -> Array:
    """(log N*, L*) of every replicate of one budget, (R, 2)."""
    z = np.log(group.params) - minimum.centre
    if pool is None:
        coefficients = parabola.fit(z, group.loss[None], _cluster_counts(group, replicates, rng))
    else:
        fitted = np.polyval(minimum.coefficients[::-1], z)
        noise = pool[rng.integers(len(pool), size=(replicates, len(z)))] / np.sqrt(np.maximum(group.weight, 1e-300))
        coefficients = parabola.fit(z, fitted + noise, group.weight[None])
    place, loss = parabola.vertex(coefficients)
    place = np.where(np.abs(place) < NOWHERE_NATS, place, np.nan)
    return np.stack([minimum.centre + place, loss], axis=1)


def _residuals(group: Points, minimum: Minimum) -> Array:
    """Weighted residuals of a parabola, each divided by sqrt(1 - leverage), so that their spread is that of
    the noise.
    """
    z = np.log(group.params) - minimum.centre
    root = np.sqrt(group.weight)
    q = np.linalg.qr(np.stack([root, root * z, root * z * z], axis=1))[0]
    leverage = np.minimum((q * q).sum(axis=1), 1 - 1e-6)
    residual = (group.loss - np.polyval(minimum.coefficients[::-1], z)) * root
    return np.asarray(residual / np.sqrt(1 - leverage), dtype=np.float64)


def _pairs(method: str, points: Points, few: bool) -> bool:
    clustered = len(np.unique(points.cluster)) < len(points)
    return method == "pairs" or (method == "auto" and (clustered or not few))


def _pick(pool: Array, replicates: int, rng: np.random.Generator) -> Array:
    return pool[rng.integers(len(pool), size=(replicates, len(pool)))]


def _cluster_counts(points: Points, replicates: int, rng: np.random.Generator) -> Array:
    """How often each point is drawn, clusters whole, times its weight: (R, n)."""
    _, place = np.unique(points.cluster, return_inverse=True)
    size = int(place.max()) + 1
    counts = rng.multinomial(size, np.full(size, 1.0 / size), size=replicates)
    return np.asarray(counts[:, place] * points.weight, dtype=np.float64)
