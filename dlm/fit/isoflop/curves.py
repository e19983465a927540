"""Fit a curve of the loss over log N or log D, and find its minimum, for many replicates at once.

Shapes: x (n,) is a log size; loss and weight are (R, n), one row per replicate, or (1, n) if all replicates share them.
'parabola' and 'cubic' are weighted least squares of the loss. 'akima' is Akima's spline (J. ACM 17, 589, 1970) through
the weighted mean log loss of each size, searched at 25 points per gap. The spline uses log loss, because log loss
reproduces the published results of Porian et al. (2406.19146); with raw loss, the slope of their first experiment is
.006 higher.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial.polynomial import polyval

from dlm.fit.points import Array

CURVES = ("parabola", "cubic", "akima")
LEAST_SIZES = {"parabola": 4, "cubic": 5, "akima": 4}
DEGREE = {"parabola": 2, "cubic": 3}
SPACE = {"parabola": "raw", "cubic": "raw", "akima": "log"}  # whether the curve runs through loss or through log loss

PER_GAP = 25  # search points between two neighbouring sizes of an Akima curve
SAME_NATS = 1e-9  # sizes whose logs differ by less count as equal


def polynomial(z: Array, loss: Array, weight: Array, degree: int = 2) -> Array:
    """Fit L = c0 + c1 z + c2 z^2 (+ c3 z^3) by weighted least squares.

    Args:
        z: Centred log sizes, (n,).
        loss: nats/token, (R, n) or (1, n).
        weight: Factor of each point, (R, n) or (1, n).
        degree: 2 or 3.

    Returns:
        The coefficients, (R, degree + 1), the constant first; NaN if the points do not determine them.
    """
    scale = np.abs(z).max()
    basis = (z / scale)[:, None] ** np.arange(degree + 1)
    gram = np.einsum("rn,ni,nj->rij", weight, basis, basis)
    right = np.einsum("rn,ni->ri", weight * loss, basis)
    usable = np.linalg.cond(gram) < 1e12
    gram = np.where(usable[:, None, None], gram, np.eye(degree + 1))
    right, usable = np.broadcast_arrays(right, usable[:, None])
    gram = np.broadcast_to(gram, (len(right), degree + 1, degree + 1))
    solved = np.linalg.solve(gram, right[..., None])[..., 0]
    return np.asarray(np.where(usable, solved, np.nan) / scale ** np.arange(degree + 1), dtype=np.float64)


@np.errstate(all="ignore")
def turning(coefficients: Array) -> tuple[Array, Array]:
    """z and L at the local minimum of parabolas (R, 3) or cubics (R, 4), each (R,); NaN if there is no minimum.

    The minimum of a cubic is the root of L' = 0 where L'' = 2 sqrt(c2^2 - 3 c1 c3) > 0. The code uses a form of this
    root without cancellation as c3 -> 0.
    """
    c1, c2 = coefficients[:, 1], coefficients[:, 2]
    if coefficients.shape[1] == 3:
        place = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
    else:
        inside = c2**2 - 3 * c1 * coefficients[:, 3]
        place = np.where(inside > 0, -c1 / (c2 + np.sqrt(inside)), np.nan)
    place = np.where(np.isfinite(place), place, np.nan)
    return place, value(coefficients, place)


def moved(coefficients: Array, by: float) -> Array:
    """The coefficients, (R, 4), of the same cubics in z - by."""
    c0, c1, c2, c3 = coefficients.T
    shifted = (value(coefficients, np.full(len(c0), by)), c1 + by * (2 * c2 + 3 * by * c3), c2 + 3 * by * c3, c3)
    return np.stack(shifted, axis=1)


def value(coefficients: Array, z: Array) -> Array:
    """The polynomials with coefficients (R, k) at z, in the shape of z: (R,) or (R, m)."""
    columns = coefficients.T.reshape(*coefficients.T.shape, *[1] * (z.ndim - 1))
    return np.asarray(polyval(z, columns, tensor=False), dtype=np.float64)


def averaged(x: Array, loss: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Average the losses of runs of equal size.

    Returns:
        The distinct log sizes, rising, (m,), their weighted mean losses (R, m) and their total weights (R, m). A size
        that has no weight in any replicate is left out.
    """
    used = weight.sum(axis=0) > 0
    order = np.argsort(x[used], kind="stable")
    x, loss, weight = x[used][order], loss[:, used][:, order], weight[:, used][:, order]
    starts = np.flatnonzero(np.diff(x, prepend=-np.inf) > SAME_NATS)
    total = np.add.reduceat(weight, starts, axis=1)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(weight * loss, starts, axis=1) / total
    return x[starts], means, total


def akima(sizes: Array, loss: Array) -> tuple[Array, Array]:
    """x and L at the lowest point of Akima's curves through `sizes` (m,) and `loss` (R, m), each (R,).

    The lowest of the searched points is refined to the exact minimum of the cubic in its gap. If a curve is lowest at
    an end, the lowest point is this end.
    """
    from scipy.interpolate import Akima1DInterpolator

    spline = Akima1DInterpolator(sizes, loss, axis=1)
    steps = np.arange(PER_GAP) / PER_GAP
    grid = np.append((sizes[:-1, None] + np.diff(sizes)[:, None] * steps).ravel(), sizes[-1])
    searched = spline(grid)
    at, rows = searched.argmin(axis=1), np.arange(len(loss))
    place, lowest = grid[at], searched[rows, at]
    for gap in (at // PER_GAP, (at - 1) // PER_GAP):  # a search point at a size belongs to two gaps
        gap = np.clip(gap, 0, len(sizes) - 2)
        z, least = turning(spline.c[::-1, gap, rows].T)
        within = (z >= 0) & (z <= np.diff(sizes)[gap]) & (least < lowest)
        place, lowest = np.where(within, sizes[gap] + z, place), np.where(within, least, lowest)
    return place, lowest


def akima_at(sizes: Array, loss: Array, x: Array) -> Array:
    """Akima's curves through `sizes` (m,) and `loss` (R, m) at x (k,): (R, k); NaN outside the sizes."""
    from scipy.interpolate import Akima1DInterpolator

    return np.asarray(Akima1DInterpolator(sizes, loss, axis=1)(x), dtype=np.float64)
