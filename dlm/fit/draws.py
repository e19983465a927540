"""Hold the results of bootstrap replicates, and turn them into intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.fit.points import UNBOUNDED, Array, Interval, Points


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The results of the bootstrap replicates.

    `rows` are refitted parameters, (R, k), NaN for a replicate without a fit. `vertices` are log N, log D and log L of
    isoFLOP minima, (R, budgets, 3). `dof` are degrees of freedom for Student's t; with 0, percentiles are used as they
    are.
    """

    rows: Array
    vertices: Array | None = None
    method: str
    dof: int = 0


def ends(point: float, values: Array, dof: int, level: float, *, log: bool = False) -> Interval:
    """Compute the interval of one number from its replicates.

    The ends are percentiles of the replicates. Their distances to the fit are stretched by the ratio of Student's to
    the normal quantile, because resampled residuals do not show the uncertainty of their own variance. A failed
    replicate could lie in either tail, so it counts in both.

    Args:
        point: The fitted value.
        values: The replicates, (R,); NaN for those that failed.
        dof: Degrees of freedom of Student's t; with 0, the percentiles are used as they are.
        level: Nominal coverage of the interval, such as 0.95.
        log: Whether to measure distances in logs, for a multiplicative number.

    Returns:
        (low, high); NaN if too many replicates failed.
    """
    tail = (1 - level) / 2
    good = values[np.isfinite(values)]
    if len(good) < (1 - tail) * len(values) or not np.isfinite(point):
        return UNBOUNDED
    good, middle = (np.log(np.maximum(good, 1e-300)), np.log(point)) if log else (good, point)
    beyond = max(tail * len(values) - (len(values) - len(good)), 0.0) / len(good)
    low, high = np.quantile(good, [beyond, 1 - beyond])
    k = stretch(dof, tail)
    pair = (min(middle, middle + k * (low - middle)), max(middle, middle + k * (high - middle)))
    with np.errstate(over="ignore"):
        return (float(np.exp(pair[0])), float(np.exp(pair[1]))) if log else (float(pair[0]), float(pair[1]))


def stretch(dof: int, tail: float) -> float:
    """The ratio of Student's quantile to the normal quantile at 1 - `tail`; 1 for `dof` 0."""
    if dof <= 0:
        return 1.0
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(dof, 1 - tail) / ndtri(1 - tail))


def hull(intervals: list[Interval]) -> Interval:
    """The smallest interval that contains all `intervals`; NaN if one of them is not known."""
    low, high = np.array(intervals).T
    return float(np.min(low)), float(np.max(high))


def cluster_counts(points: Points, replicates: int, rng: np.random.Generator) -> Array:
    """Resample whole clusters: the number of times that each point is drawn, times its weight, (R, n)."""
    _, place = np.unique(points.cluster, return_inverse=True)
    size = int(place.max()) + 1
    drawn = rng.integers(size, size=(replicates, size)) + size * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * size).reshape(replicates, size)
    return np.asarray(counts[:, place] * points.weight, dtype=np.float64)
