"""parabola: the runs of one budget -> the minimum of the loss over log N, or a typed refusal.
Called by isoflop, resample.

Approach 2 of Hoffmann et al. (2203.15556): least squares of L = c0 + c1 z + c2 z^2, z = log N - centre.
"""

from __future__ import annotations

import numpy as np

from dlm.fit import text
from dlm.fit.points import Array
from dlm.fit.result import Minimum

REASONS = ("too_few_points", "not_convex", "outside_grid", "edge")
LEAST_POINTS = 4


def fit(z: Array, loss: Array, weight: Array) -> Array:
    """Weighted least squares of every replicate: loss, weight (R, n) or (1, n) -> c (R, 3); NaN where
    undetermined.
    """
    scale = np.abs(z).max()
    basis = np.stack([np.ones_like(z), z / scale, (z / scale) ** 2], axis=1)
    gram = np.einsum("rn,ni,nj->rij", weight, basis, basis)
    right = np.einsum("rn,ni->ri", weight * loss, basis)
    usable = np.linalg.cond(gram) < 1e12
    gram = np.where(usable[:, None, None], gram, np.eye(3))
    right, usable = np.broadcast_arrays(right, usable[:, None])
    solved = np.linalg.solve(np.broadcast_to(gram, (len(right), 3, 3)), right[..., None])[..., 0]
    return np.asarray(np.where(usable, solved, np.nan) / scale ** np.arange(3), dtype=np.float64)


def vertex(coefficients: Array) -> tuple[Array, Array]:
    """z and L at the minimum, shape (R,); NaN where the parabola has none."""
    c0, c1, c2 = coefficients.T
    with np.errstate(all="ignore"):
        convex = c2 > 0
        place = np.where(convex, -c1 / (2 * c2), np.nan)
        return place, np.where(convex, c0 - c1**2 / (4 * c2), np.nan)


def minimum(budget: float, params: Array, loss: Array, weight: Array) -> Minimum:
    """The vertex of one budget (N and L; D is the caller's), refused where the points do not bracket it."""
    sizes = np.unique(params)
    head = f"budget {text.flops(budget)}"
    if len(sizes) < LEAST_POINTS:
        detail = f"{head}: {len(sizes)} sizes, and a parabola needs {LEAST_POINTS} or more"
        return Minimum(budget=budget, num_points=len(params), reason="too_few_points", detail=detail)
    centre = float(np.log(sizes).mean())
    coefficients = fit(np.log(params) - centre, loss[None], weight[None])
    place, lowest = (float(v[0]) for v in vertex(coefficients))
    reason, detail = _refusal(head, sizes, params, loss, centre + place)
    known = not reason
    c0, c1, c2 = coefficients[0].tolist()
    return Minimum(
        budget=budget,
        num_points=len(params),
        reason=reason,
        detail=detail,
        N=float(np.exp(centre + place)) if known else float("nan"),
        L=lowest if known else float("nan"),
        centre=centre,
        coefficients=(c0, c1, c2),
    )


def _refusal(head: str, sizes: Array, params: Array, loss: Array, log_n: float) -> tuple[str, str]:
    """('', '') for an interior minimum, else one of REASONS and a sentence."""
    span = f"{text.count(sizes[0])} to {text.count(sizes[-1])}"
    if not np.isfinite(log_n):
        return (
            "not_convex",
            f"{head}: the loss does not curve upwards over {span}, so it has no minimum there",
        )
    side, more = _side(sizes, params[loss.argmin()])
    if side:
        return (
            "edge",
            f"{head}: the lowest loss is at the {side} size tried ({span}): {more} are needed to bracket it",
        )
    if not np.log(sizes[0]) < log_n < np.log(sizes[-1]):
        place = text.count(float(np.exp(np.clip(log_n, -700, 700))))
        return (
            "outside_grid",
            f"{head}: the parabola's minimum ({place}) lies outside the sizes tried ({span})",
        )
    return "", ""


def _side(sizes: Array, lowest: float) -> tuple[str, str]:
    if lowest == sizes[0]:
        return "smallest", "smaller ones"
    return ("largest", "larger ones") if lowest == sizes[-1] else ("", "")
