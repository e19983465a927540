"""surface_draws: surfaces refitted to resampled points. Called by resample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlm.fit import draws, scan, solver
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult
from dlm.fit.surface import NUM_PARAMS

FEW = 40  # points; below, 'auto' resamples residuals


def draw(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    problem = solver.problem_of(
        points, space=result.space, norm=result.loss, delta=np.nan_to_num(result.delta, nan=1e-3)
    )
    theta = _theta(problem, result)
    fitted, target = solver.predict(problem, theta)[0], solver.target_of(problem, points.loss)
    residual, dof = target - fitted, len(points) - NUM_PARAMS
    if draws.by_pairs(method, points, len(points) < FEW):
        weight, targets, method, dof = draws.cluster_counts(points, replicates, rng), target[None], "pairs", 0
    else:
        weight, method = points.weight[None], "residuals"
        scaled = residual * np.sqrt(points.weight * len(points) / dof)
        drawn = draws.pick(scaled - scaled.mean(), replicates, rng)
        targets = fitted + drawn / np.sqrt(np.maximum(points.weight, 1e-300))
    found, done = _refit(problem, theta, residual, targets, weight)
    rows = solver.natural(problem, found)
    failed = np.logical_not(np.logical_and(done, np.isfinite(rows).all(axis=1)))
    rows[failed] = np.nan
    return draws.Draws(rows=rows, vertices=None, method=method, dof=dof)


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
