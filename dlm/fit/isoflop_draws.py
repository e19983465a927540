"""isoflop_draws: isoFLOP minima and lines of resampled points. Called by resample."""

from __future__ import annotations

import numpy as np

from dlm.fit import draws, parabola
from dlm.fit.isoflop import lines
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult, Minimum

FEW = 10  # points a budget; below, 'auto' resamples residuals
NOWHERE_NATS = 50.0  # a vertex this far from the sizes tried is none


def draw(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    usable = result.usable
    groups = [points.at_budget(m.budget) for m in usable]
    few = min(len(g) for g in groups) < FEW
    pairs = draws.by_pairs(method, points, few)
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
    return draws.Draws(rows=rows, vertices=logs, method="pairs" if pairs else "residuals", dof=dof)


def _vertices(group: Points, minimum: Minimum, pool: Array | None, replicates: int, rng: np.random.Generator) -> Array:
    """(log N*, L*) of every replicate of one budget, (R, 2)."""
    z = np.log(group.params) - minimum.centre
    if pool is None:
        coefficients = parabola.fit(z, group.loss[None], draws.cluster_counts(group, replicates, rng))
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
