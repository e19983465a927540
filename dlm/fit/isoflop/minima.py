"""Find the minimum of the loss over log N or log D among the runs of one budget, or the reason why it has none."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop import curves
from dlm.fit.points import Array, Cost, Points


class Axis(NamedTuple):
    """The words that describe the axis of a curve in messages."""

    many: str
    one: str
    first: str  # the lowest value tried
    last: str
    before: str  # values below the lowest value tried
    after: str


AXES = {
    "params": Axis("sizes", "size", "smallest", "largest", "smaller ones", "larger ones"),
    "tokens": Axis("training lengths", "training length", "shortest", "longest", "shorter ones", "longer ones"),
}
ARTICLES = {"parabola": "a parabola", "cubic": "a cubic", "akima": "an Akima curve"}


def along(points: Points, axis: str) -> Array:
    """The values of the points on the axis of a curve: log N or log D, (n,)."""
    return np.log(points.params if axis == "params" else points.tokens)


def mean_losses(points: Points, curve: str, axis: str) -> tuple[Array, Array]:
    """The log sizes of one budget, rising, (m,), and the mean loss of each in the space of the curve, (1, m)."""
    loss = np.log(points.loss) if curves.SPACE[curve] == "log" else points.loss
    return curves.averaged(along(points, axis), loss[None], points.weight[None])[:2]


def minimum(points: Points, cost: Cost, *, curve: str, axis: str) -> Minimum:
    """Find the minimum of the curve of one budget.

    The curve gives N with axis 'params', and D with axis 'tokens'. The other number follows from the cost of a token.
    """
    assert points.budget is not None
    budget = float(points.budget[0])
    blank = Minimum(budget=budget, num_points=len(points))
    head = f"budget {text.flops(budget)}"
    sizes, means = mean_losses(points, curve, axis)
    least = curves.LEAST_SIZES[curve]
    if len(sizes) < least:
        many = AXES[axis].one if len(sizes) == 1 else AXES[axis].many
        why = f"{len(sizes)} {many}, and {ARTICLES[curve]} needs {least} or more"
        return replace(blank, reason="too_few_points", why=why, detail=f"{head}: {why}")
    centre = float(sizes.mean())
    place, lowest, coefficients = _lowest(curve, along(points, axis) - centre, sizes - centre, means, points)
    reason, why = _refusal(curve, axis, sizes, means[0], centre + place)
    if reason:
        found = replace(blank, centre=centre, coefficients=tuple(coefficients.tolist()))
        return replace(found, reason=reason, why=why, detail=f"{head}: {why}")
    best = float(np.exp(centre + place))
    if axis == "params":
        n, d = best, budget / float(np.exp(cost.log_per_token(np.log([best])))[0])
    else:
        n, d = float(np.exp(cost.log_size(np.log([budget / best])))[0]), best
    if curve == "cubic":
        # If a cubic is expanded about its minimum, c2 gives the curvature there, as for a parabola.
        centre, coefficients = centre + place, curves.moved(coefficients[None], place)[0]
    return replace(
        blank,
        N=n,
        D=d,
        L=float(np.exp(lowest)) if curves.SPACE[curve] == "log" else lowest,
        centre=centre,
        coefficients=tuple(coefficients.tolist()),
    )


def _lowest(curve: str, z: Array, sizes: Array, means: Array, points: Points) -> tuple[float, float, Array]:
    """The place and loss of the minimum, and the coefficients of the curve (for an Akima curve, of a parabola)."""
    found = curves.polynomial(z, points.loss[None], points.weight[None], curves.DEGREE.get(curve, 2))
    place, lowest = curves.akima(sizes, means) if curve == "akima" else curves.turning(found)
    return float(place[0]), float(lowest[0]), found[0]


def _refusal(curve: str, axis: str, sizes: Array, means: Array, place: float) -> tuple[str, str]:
    """The `reason` of a `Minimum` and a sentence on it; both are empty if there is an interior minimum."""
    words = AXES[axis]
    span = text.interval(np.exp(sizes[[0, -1]]).tolist(), "count")
    if not np.isfinite(place):
        return "not_convex", f"the loss does not curve upwards over {span}, so it has no minimum there"
    lowest = place if curve == "akima" else float(sizes[means.argmin()])
    if not sizes[0] < lowest < sizes[-1]:
        side, more = (words.first, words.before) if lowest <= sizes[0] else (words.last, words.after)
        return "edge", f"the lowest loss is at the {side} {words.one} tried ({span}): {more} are needed to bracket it"
    if not sizes[0] < place < sizes[-1]:
        there = text.count(float(np.exp(np.clip(place, -700, 700))))
        return "outside_grid", f"the {curve}'s minimum ({there}) lies outside the {words.many} tried ({span})"
    return "", ""
