"""draws: what a bootstrap produced, and how points and residuals are drawn again. Called by the resampling modules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.fit.points import NAN, Array, Interval, Points


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """What a bootstrap produced: parameter rows (R, k), vertices as logs (R, budgets, 3), and how to read them."""

    rows: Array
    vertices: Array | None
    method: str
    dof: int  # for Student's t; 0 means percentiles as they are


def by_pairs(method: str, points: Points, few: bool) -> bool:
    clustered = len(np.unique(points.cluster)) < len(points)
    return method == "pairs" or (method == "auto" and (clustered or not few))


def cluster_counts(points: Points, replicates: int, rng: np.random.Generator) -> Array:
    """How often each point is drawn, clusters whole, times its weight: (R, n)."""
    _, place = np.unique(points.cluster, return_inverse=True)
    size = int(place.max()) + 1
    drawn = rng.integers(size, size=(replicates, size)) + size * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * size).reshape(replicates, size)
    return np.asarray(counts[:, place] * points.weight, dtype=np.float64)
