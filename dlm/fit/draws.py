"""draws: what a bootstrap produced, and how points and residuals are drawn again. Called by the resampling modules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.fit.points import Array, Points


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
