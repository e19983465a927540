"""Sample surfaces that are compatible with the noise of the runs, by refitting the law to resampled points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dlm.core.errors import UserError
from dlm.fit import draws
from dlm.fit.engine import newton, scan
from dlm.fit.engine.newton import Norm
from dlm.fit.engine.search import chinchilla_problem
from dlm.fit.fitted import Fitted
from dlm.fit.points import Array, Mask, Points
from dlm.fit.surface import noise

FEW = 40  # on fewer points, 'auto' resamples residuals
FEW_CLUSTERS = 40  # with fewer trunks or runs, resampling whole clusters is too coarse, and 'auto' draws nested noise
LEAST_CLUSTERS = 5  # fewer clusters cannot be resampled as a whole, because they do not show how clusters scatter
FEW_RESIDUALS = 5  # with fewer residuals, each is used with both signs


def draw(result: Fitted, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    """Refit the law to resampled points.

    Args:
        result: A fitted surface.
        replicates: Number of samples to refit.
        method: As in `bootstrap`.
        rng: The source of random numbers.

    Returns:
        The parameters of every replicate, NaN for a replicate without a fit.

    Raises:
        UserError: If the points do not permit the method.
    """
    points = result.points
    assert points is not None
    problem, thetas = known(result)
    method = method_of(method, points, result.how)
    fitted = newton.predict(problem, thetas[:1])[0]
    nested = partial(noise.draw_nested, points, problem, thetas[:1], replicates, rng)
    free = len(problem.free)
    targets, weight = samples(points, result.how, fitted, free, nested, replicates, method, rng)
    dof = len(points) - free if method == "residuals" else 0
    return draws.Draws(rows=refit(result, targets, weight), method=method, dof=dof)


def samples(
    points: Points,
    how: Norm,
    fitted: Array,
    free: int,
    nested: Callable[[], Array],
    replicates: int,
    method: str,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Resample the points.

    Args:
        points: The points.
        how: The space of the residuals and their norm.
        fitted: What the law predicts in this space, (n,).
        free: Number of fitted parameters.
        nested: Draws noise of trunks and points, (R, n), for the method 'nested'.
        replicates: Number of samples, R.
        method: 'pairs', 'residuals' or 'nested'.
        rng: The source of random numbers.

    Returns:
        The targets and the weights of the points in each sample, each (R, n) or, if all samples share them, (1, n).
    """
    target = newton.in_space(points.loss, how)
    if method == "pairs":
        return target[None], draws.cluster_counts(points, replicates, rng)
    if method == "nested":
        return fitted + nested(), points.weight[None]
    pool = _pool((target - fitted) * np.sqrt(points.weight), free, how.norm)
    drawn = pool[rng.integers(len(pool), size=(replicates, len(points)))]
    return fitted + drawn / np.sqrt(np.maximum(points.weight, 1e-300)), points.weight[None]


def refit(result: Fitted, targets: Array, weight: Array) -> Array:
    """Refit a surface to resampled targets and weights: rows of parameters, (R, p), NaN for a sample without a fit."""
    law, points = result.fitted_law, result.points
    assert points is not None
    problem, thetas = known(result)
    residual = newton.target_of(problem, points.loss) - newton.predict(problem, thetas[:1])[0]
    replicates = max(len(targets), len(weight))
    # The starts are found in chunks, because the scan needs much memory.
    chunks = newton.chunks(replicates, len(points))
    begin = [starts(problem, thetas, residual, newton.take(targets, c), newton.take(weight, c)) for c in chunks]
    found, _, done = newton.minimise(problem, np.concatenate(begin), targets, weight)
    rows = law.rows(found, problem.centre)
    rows[~(done & np.isfinite(rows).all(axis=1))] = np.nan
    return rows


def known(result: Fitted) -> tuple[newton.Problem, Array]:
    """The problem of a fitted surface, and theta of the fit and of its rivals, (1 + rivals, p)."""
    law, points = result.fitted_law, result.points
    assert points is not None
    problem = newton.problem_of(points, law, result.how, result.fixed)
    known = np.array([[params[name] for name in law.params] for params in (result.params, *result.rivals)])
    return problem, law.theta(known, problem.centre)


def method_of(method: str, points: Points, how: Norm) -> str:
    """Return 'pairs', 'residuals' or 'nested': the requested method or, for 'auto', the one that suits the points."""
    even = how.under_tuned == 1.0
    if not even and method in ("nested", "residuals"):
        raise UserError(f"bootstrap method '{method}' draws symmetric noise, and under_tuned is not 1: take 'pairs'")
    clusters = points.num_clusters
    if method == "auto":
        few = clusters < FEW_CLUSTERS and len(points) <= noise.MOST_NESTED
        if even and few and noise.is_nested(points):
            return "nested"
        method = "residuals" if even and clusters == len(points) < FEW else "pairs"
    if method == "pairs" and clusters < LEAST_CLUSTERS:
        raise UserError(f"the points are of {clusters} runs or trunks: {LEAST_CLUSTERS} or more have to be drawn whole")
    return method


def _pool(residual: Array, free: int, norm: str) -> Array:
    """The pool of residuals to resample, corrected for the `free` parameters that were fitted to them.

    Least squares shrinks the residuals by a factor of sqrt(1 - p/n) on average. Under a norm that is not differentiable
    at zero, such as the absolute error, the law passes exactly through p of the points. Their residuals carry no
    information on the noise and are left out; the others keep their size.
    """
    if norm == "mse":
        pool = residual * np.sqrt(len(residual) / (len(residual) - free))
    else:
        pool = np.delete(residual, np.argsort(np.abs(residual))[:free])
    if len(pool) < FEW_RESIDUALS:  # centring one or two residuals would leave little of them
        pool = np.concatenate([pool, -pool])
    return np.asarray(pool - pool.mean())


def starts(problem: newton.Problem, thetas: Array, residual: Array, targets: Array, weight: Array) -> Array:
    """The start of each replicate, (R, p): the fit, a rival or a start from its own scan, whichever is best."""
    begin = np.repeat(thetas[:1], max(len(targets), len(weight)), axis=0)
    lowest = newton.value(problem, thetas[:1], targets, weight)
    for other in (*thetas[1:, None], *_scanned(problem, residual, targets, weight)):
        found = newton.value(problem, other, targets, weight)
        better: Mask = found < lowest
        begin[better] = np.broadcast_to(other, begin.shape)[better]
        lowest = np.where(better, found, lowest)
    return begin


def _scanned(problem: newton.Problem, residual: Array, targets: Array, weight: Array) -> Array:
    """The law's starts, (V, R, p), from the Chinchilla law that the scan of each replicate finds.

    Points far from the fit weigh less in the scan, because the scan uses least squares. The starts of a replicate are
    NaN if its scan finds no law.
    """
    if problem.has_its_surface:
        return np.empty((0, 0, 0))
    loss = np.exp(targets) if problem.how.space == "log" else targets
    tame = 1.0 if problem.how.norm == "mse" else 1.0 / np.maximum(np.abs(residual), problem.how.delta)
    begin, usable = scan.starts(chinchilla_problem(problem), loss, weight * tame)
    starts = problem.pinned(problem.law.starts(begin)).reshape(-1, *begin.shape[:1], len(problem.law.params))
    return np.where(usable[:, None], starts, np.nan)
