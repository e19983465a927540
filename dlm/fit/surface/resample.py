"""surface_draws: surfaces refitted to resampled points. Called by resample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit import draws
from dlm.fit.engine import newton, scan
from dlm.fit.engine.search import chinchilla_problem
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult
from dlm.fit.surface import noise

FEW = 40  # points; below, 'auto' resamples residuals


FEW_CLUSTERS = 40  # trunks or runs; below, drawing them whole says too little, and 'auto' draws nested noise


FEW_RESIDUALS = 5  # below, each counts with both signs


LEAST_CLUSTERS = 5  # drawn whole; fewer say nothing of how they scatter


def draw(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    """Rows of refitted parameters; NaN where a replicate has no fit."""
    assert result.surface is not None and result.how is not None
    law, how = result.surface, result.how
    problem = newton.problem_of(
        points,
        law,
        space=how.space,
        norm=how.norm,
        delta=how.delta,
        under_tuned=how.under_tuned,
        fixed=dict(result.fixed),
    )
    thetas = law.theta(_rows(result), problem.centre)
    fitted, target = newton.predict(problem, thetas[:1])[0], newton.target_of(problem, points.loss)
    residual, dof = target - fitted, len(points) - len(problem.free)
    clusters, tilted = len(np.unique(points.cluster)), how.under_tuned < 1.0
    nested = noise.is_nested(points) and clusters < FEW_CLUSTERS and len(points) <= noise.MOST_NESTED
    if tilted and method in ("nested", "residuals"):
        raise UserError(
            f"bootstrap method '{method}' draws noise that lies evenly, and under_tuned does not: take pairs"
        )
    if method == "nested" or (method == "auto" and nested and not tilted):
        weight, method, dof = points.weight[None], "nested", 0
        targets = fitted + noise.draw_nested(points, problem, thetas[:1], replicates, rng)
    elif draws.by_pairs(method, points, len(points) < FEW and not tilted):
        if clusters < LEAST_CLUSTERS:
            raise UserError(
                f"the points are of {clusters} runs or trunks: {LEAST_CLUSTERS} or more have to be drawn whole"
            )
        weight, targets, method, dof = draws.cluster_counts(points, replicates, rng), target[None], "pairs", 0
    else:
        weight, method = points.weight[None], "residuals"
        pool = _pool(residual * np.sqrt(points.weight), len(problem.free), how.norm)
        drawn = pool[rng.integers(len(pool), size=(replicates, len(points)))]
        targets = fitted + drawn / np.sqrt(np.maximum(points.weight, 1e-300))
    found, done = _refit(problem, thetas, residual, targets, weight)
    rows = law.rows(found, problem.centre)
    failed = np.logical_not(np.logical_and(done, np.isfinite(rows).all(axis=1)))
    rows[failed] = np.nan
    return draws.Draws(rows=rows, vertices=None, method=method, dof=dof)


def _pool(residual: Array, free: int, norm: str) -> Array:
    """What residuals are drawn from, corrected for the parameters that were fitted to them.

    Squares shrink all residuals, by sqrt(1 - p/n) in the mean. A norm with a corner goes through p of the points, as
    absolute errors do: those p say nothing of the noise, and the others are as large as they should be.
    """
    if norm == "mse":
        pool = residual * np.sqrt(len(residual) / (len(residual) - free))
    else:
        pool = np.delete(residual, np.argsort(np.abs(residual))[:free])
    if len(pool) < FEW_RESIDUALS:  # centred, one or two would be nothing
        pool = np.concatenate([pool, -pool])
    return np.asarray(pool - pool.mean())


def _rows(result: FitResult) -> Array:
    """The fit and its rivals."""
    assert result.surface is not None
    return np.array([[p[name] for name in result.surface.params] for p in (result.params, *result.rivals)])


def _refit(
    problem: newton.Problem, thetas: Array, residual: Array, targets: Array, weight: Array
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Newton from the best of the fit itself, its rivals and each replicate's own scan (outliers held down)."""
    count = max(len(targets), len(weight))
    begin = np.empty((count, thetas.shape[1]))
    for i in range(0, count, newton.CHUNK):
        rows = slice(i, i + newton.CHUNK)
        begin[rows] = _begin(problem, thetas, residual, newton.take(targets, rows), newton.take(weight, rows))
    found, _, done = newton.minimise(problem, begin, targets, weight)
    return found, done


def _begin(problem: newton.Problem, thetas: Array, residual: Array, targets: Array, weight: Array) -> Array:
    begin = np.repeat(thetas[:1], max(len(targets), len(weight)), axis=0)
    lowest = newton.value(problem, thetas[:1], targets, weight)
    for other in (*thetas[1:, None], *_scanned(problem, residual, targets, weight)):
        found = newton.value(problem, other, targets, weight)
        better = found < lowest
        begin[better] = np.broadcast_to(other, begin.shape)[better]
        lowest = np.where(better, found, lowest)
    return begin


def _scanned(problem: newton.Problem, residual: Array, targets: Array, weight: Array) -> list[Array]:
    """Starts of the law, each (R, p), from the Chinchilla law that each replicate's own scan finds."""
    if problem.has_its_surface:
        return []
    loss = np.exp(targets) if problem.space == "log" else targets
    tame = 1.0 if problem.norm == "mse" else 1.0 / np.maximum(np.abs(residual), problem.delta)
    begin, usable = scan.starts(chinchilla_problem(problem), loss, weight * tame)
    starts = problem.pinned(problem.law.starts(begin))
    starts = starts.reshape(-1, len(begin), starts.shape[1]) if len(starts) % len(begin) == 0 else starts[None]
    return [np.where(usable[:, None], each, np.nan) for each in starts]
